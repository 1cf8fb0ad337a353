"""Greedy non-maximum suppression, exact, with static shapes."""

from keras import ops

from keras_fpn.boxes import pairwise_iou
from keras_fpn.ranking import take_rows


def non_max_suppression(
    boxes, scores, groups, iou_threshold: float, max_output: int, tile_size: int = 256
):
    """What the textbook loop keeps: the best box, then the best that no kept one suppresses, ...

    A box is suppressed by a kept box of its own group whose IoU with it is over the threshold.
    Of equal scores the lower index goes first.

    The boxes, in the order of their scores, are settled a tile at a time: first against those kept
    so far, then among themselves, and the loop ends as soon as every image has `max_output` boxes
    or none left.

    Args:
        boxes: `[B, N, 4]` xyxy.
        scores: `[B, N]`; -inf (or NaN) marks a row that is no candidate.
        groups: `[B, N]` or `[1, N]` integers; only boxes of one group compete (level, or class).
        iou_threshold: boxes that overlap by more than this compete.
        max_output: how many boxes an image keeps at the most.
        tile_size: boxes settled at once; it changes the speed, never the result.

    Returns:
        `[B, max_output]` int32 indices into N in the order of the scores, -1 where none is left.
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

    def settle_tile(tile, kept, count):
        start = tile * tile_size
        tile_boxes = ops.slice(boxes, (0, start, 0), (batch, tile_size, 4))
        tile_groups = ops.slice(groups, (0, start), (batch, tile_size))
        alive = ops.slice(candidate, (0, start), (batch, tile_size))

        kept_positions = kept[:, :max_output]
        by_kept = _competes(
            take_rows(boxes, kept_positions),
            take_rows(groups, kept_positions),
            tile_boxes,
            tile_groups,
            iou_threshold,
        )
        by_kept = ops.logical_and(by_kept, (slots < count[:, None])[:, :, None])
        alive = ops.logical_and(alive, ops.logical_not(ops.any(by_kept, axis=1)))

        within = _competes(tile_boxes, tile_groups, tile_boxes, tile_groups, iou_threshold)
        keep = _greedy(alive, ops.logical_and(within, earlier))

        # Slot `max_output` is where everything goes that is not kept.
        slot = count[:, None] + ops.cumsum(ops.cast(keep, "int32"), axis=1) - 1
        slot = ops.where(ops.logical_and(keep, slot < max_output), slot, max_output)
        positions = ops.broadcast_to(start + ops.arange(tile_size, dtype="int32"), ops.shape(slot))
        where = ops.reshape(ops.stack([rows, slot], axis=-1), (-1, 2))
        kept = ops.scatter_update(kept, where, ops.reshape(positions, (-1,)))
        count = ops.minimum(count + ops.sum(ops.cast(keep, "int32"), axis=1), max_output)
        return tile + 1, kept, count

    _, kept, count = ops.while_loop(
        unfinished,
        settle_tile,
        (
            ops.convert_to_tensor(0, "int32"),
            ops.zeros((batch, max_output + 1), "int32"),
            ops.zeros((batch,), "int32"),
        ),
    )
    order = ops.pad(order, [[0, 0], [0, padding]])
    return ops.where(slots < count[:, None], take_rows(order, kept[:, :max_output]), -1)


def _competes(boxes_a, groups_a, boxes_b, groups_b, iou_threshold):
    same_group = groups_a[:, :, None] == groups_b[:, None, :]
    return ops.logical_and(pairwise_iou(boxes_a, boxes_b) > iou_threshold, same_group)


def _greedy(alive, suppresses):
    """The greedy choice among one tile.

    A box is kept if it is alive and no kept one before it suppresses it. Iterated from "all kept",
    pass n is right for the first n boxes at least, so the first pass that changes nothing is the
    answer; real boxes need a handful of passes.

    Args:
        alive: `[B, T]` bool.
        suppresses: `[B, T, T]` bool, strictly upper triangular: `[i, j]`, i would suppress j.
    """
    # A count of at most T, exact in any float format that a matrix product may use.
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
