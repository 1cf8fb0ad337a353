"""Greedy non-maximum suppression, exact, with static shapes."""

from keras import ops

from keras_fpn.boxes import pairwise_iou
from keras_fpn.ranking import take_rows
from keras_fpn.typing import Tensor


def non_max_suppression(
    boxes, scores, groups, iou_threshold: float, max_output: int, tile_size: int = 256
) -> Tensor:
    """Greedy non-maximum suppression within groups, such as levels or classes.

    In descending order of score, a box is kept unless its IoU with a kept box of its own group
    exceeds the threshold. Ties go to the lower index.

    Boxes are processed one tile at a time: first against the boxes kept so far, then against each
    other. The loop ends as soon as every image has `max_output` boxes or no more candidates.

    Args:
        boxes: `[B, N, 4]` xyxy.
        scores: `[B, N]`; -inf (or NaN) for rows that are not candidates.
        groups: `[B, N]` or `[1, N]` integers; boxes of different groups do not suppress each other.
        iou_threshold: NMS IoU threshold.
        max_output: largest number of boxes kept per image.
        tile_size: boxes per tile; it affects the speed only. Defaults to 256.

    Returns:
        `[B, max_output]` int32 indices into N in descending order of score, padded with -1.
    """
    total = boxes.shape[1]
    tile_size = min(tile_size, total)
    tiles = -(-total // tile_size)
    padding = tiles * tile_size - total
    batch = ops.shape(boxes)[0]

    scores = ops.where(ops.isnan(scores), -float("inf"), scores)
    order = ops.cast(ops.argsort(-scores, axis=-1), "int32")
    groups = ops.broadcast_to(ops.cast(groups, "int32"), ops.shape(scores))
    boxes = ops.pad(take_rows(boxes, order), [[0, 0], [0, padding], [0, 0]])
    groups = ops.pad(take_rows(groups, order), [[0, 0], [0, padding]])
    candidate = ops.pad(take_rows(scores, order) > -float("inf"), [[0, 0], [0, padding]])

    slots = ops.arange(max_output, dtype="int32")
    rows = ops.broadcast_to(ops.arange(batch, dtype="int32")[:, None], (batch, tile_size))
    earlier = ops.arange(tile_size)[:, None] < ops.arange(tile_size)[None, :]

    def unfinished(tile, kept, count):
        start = ops.minimum(tile, tiles - 1) * tile_size
        more = ops.logical_and(count < max_output, ops.take(candidate, start, axis=1))
        return ops.logical_and(tile < tiles, ops.any(more))

    def process_tile(tile, kept, count):
        start = tile * tile_size
        tile_boxes = ops.slice(boxes, (0, start, 0), (batch, tile_size, 4))
        tile_groups = ops.slice(groups, (0, start), (batch, tile_size))
        alive = ops.slice(candidate, (0, start), (batch, tile_size))

        kept_positions = kept[:, :max_output]
        by_kept = _suppresses(
            take_rows(boxes, kept_positions),
            take_rows(groups, kept_positions),
            tile_boxes,
            tile_groups,
            iou_threshold,
        )
        by_kept = ops.logical_and(by_kept, (slots < count[:, None])[:, :, None])
        alive = ops.logical_and(alive, ops.logical_not(ops.any(by_kept, axis=1)))

        within = _suppresses(tile_boxes, tile_groups, tile_boxes, tile_groups, iou_threshold)
        keep = _greedy(alive, ops.logical_and(within, earlier))

        # Boxes that are not kept go to the slot `max_output`.
        slot = count[:, None] + ops.cumsum(ops.cast(keep, "int32"), axis=1) - 1
        slot = ops.where(ops.logical_and(keep, slot < max_output), slot, max_output)
        positions = ops.broadcast_to(start + ops.arange(tile_size, dtype="int32"), ops.shape(slot))
        where = ops.reshape(ops.stack([rows, slot], axis=-1), (-1, 2))
        kept = ops.scatter_update(kept, where, ops.reshape(positions, (-1,)))
        count = ops.minimum(count + ops.sum(ops.cast(keep, "int32"), axis=1), max_output)
        return tile + 1, kept, count

    _, kept, count = ops.while_loop(
        unfinished,
        process_tile,
        (
            ops.convert_to_tensor(0, "int32"),
            ops.zeros((batch, max_output + 1), "int32"),
            ops.zeros((batch,), "int32"),
        ),
    )
    order = ops.pad(order, [[0, 0], [0, padding]])
    return ops.where(slots < count[:, None], take_rows(order, kept[:, :max_output]), -1)


def _suppresses(boxes_a, groups_a, boxes_b, groups_b, iou_threshold):
    same_group = groups_a[:, :, None] == groups_b[:, None, :]
    return ops.logical_and(pairwise_iou(boxes_a, boxes_b) > iou_threshold, same_group)


def _greedy(alive, suppresses):
    """Greedy NMS within one tile, as a fixed point.

    A box is kept if it is alive and no kept box before it suppresses it. Starting from all boxes,
    pass n is correct for at least the first n, so the first pass without a change is the result;
    real boxes take a handful of passes.

    Args:
        alive: `[B, T]` bool, boxes that are still candidates.
        suppresses: `[B, T, T]` bool, strictly upper triangular: at `[i, j]`, whether i would
            suppress j.

    Returns:
        `[B, T]` bool, the boxes that are kept.
    """
    # Counts of at most T are exact in any float format of a matrix product.
    suppresses = ops.cast(suppresses, "float32")

    def step(keep, settled):
        suppressors = ops.matmul(ops.cast(keep, "float32")[:, None, :], suppresses)[:, 0, :]
        updated = ops.logical_and(alive, suppressors < 0.5)
        return updated, ops.all(updated == keep)

    keep, _ = ops.while_loop(
        lambda keep, settled: ops.logical_not(settled),
        step,
        (alive, ops.convert_to_tensor(False)),
    )
    return keep
