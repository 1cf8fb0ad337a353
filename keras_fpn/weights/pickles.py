"""An interpreter of pickles that runs nothing of them.

A pickle is a program. Its operations are interpreted one by one: those that build plain containers
are carried out, and the functions that it calls are those of `pickle_globals.py`.
"""

import io
import pickletools
import struct
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, NoneType
from typing import Any

import numpy as np

from keras_fpn.weights.pickle_globals import (
    Storage,
    StorageType,
    Unbuilt,
    build,
    find_global,
    find_storage,
    update,
)
from keras_fpn.weights.refusal import DAMAGED, Refused, damage, kind, shown, typed

# A tensor takes about 35 operations, and interpreting one about 10 microseconds.
MAX_OPERATIONS = 250_000
MAX_VALUES = 2_000_000
MAX_DEPTH = 100
# Bytes of a container, its place in the memo and what `check_plain` notes of it.
CONTAINER_SIZE = 300
CONTAINERS = {"EMPTY_LIST", "LIST", "EMPTY_DICT", "DICT"}
CONTAINERS |= {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def _refuse_storage(_key: str, _type: StorageType, _size: int) -> bytearray:
    raise Refused("refers to data outside the pickle")


def unpickle(
    stream: io.BytesIO,
    allowance: int,
    storages: dict[str, Storage] | None = None,
    make_storage: Callable[[str, StorageType, int], bytearray] = _refuse_storage,
) -> Any:
    """Interprets one pickle.

    Args:
        stream: positioned at the pickle's start; left at its end.
        allowance: bytes that the pickle's calls and containers may take.
        storages: by key, as in `find_storage`; filled in place.
        make_storage: as `make` of `find_storage`. Without it, tensors are refused.

    Returns:
        The pickle's value, which may contain what `check_plain` refuses.

    Raises:
        Refused: if the pickle is damaged, or asks for anything but arrays and plain containers.
    """
    storages = {} if storages is None else storages
    memo: dict[int, Any] = {}
    # The stack, as one list for what lies below the first mark and one for each mark.
    piles: list[list] = [[]]
    # One operation for every 8 bytes of a large file: proposals of 118,000 images take 5 million.
    limit = max(MAX_OPERATIONS, (allowance - 2**26) // 128)

    def pop() -> Any:
        if not piles[-1]:
            raise Refused(DAMAGED)
        return piles[-1].pop()

    def top() -> Any:
        if not piles[-1]:
            raise Refused(DAMAGED)
        return piles[-1][-1]

    def take() -> list:
        """Everything since the last mark."""
        if len(piles) == 1:
            raise Refused(DAMAGED)
        return piles.pop()

    for count, (operation, argument) in enumerate(_operations(stream)):
        if count > limit:
            raise Refused(f"is a pickle of more than {limit} operations")
        if operation in CONTAINERS:
            allowance = _spent(allowance, CONTAINER_SIZE)
        match operation:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                if len(piles) != 1 or len(piles[0]) != 1:
                    raise Refused(DAMAGED)
                return pop()
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "FLOAT" | "BINFLOAT":
                piles[-1].append(argument)
            case "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE":
                piles[-1].append(argument)
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                piles[-1].append(argument)
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                piles[-1].append(bytes(argument))
            case name if name in _CONSTANTS:
                piles[-1].append(_CONSTANTS[name])
            case "MARK":
                piles.append([])
            case "TUPLE":
                items = take()
                piles[-1].append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [pop() for _ in range(int(operation[-1]))]
                piles[-1].append(tuple(items[::-1]))
            case "EMPTY_LIST":
                piles[-1].append([])
            case "LIST":
                items = take()
                piles[-1].append(items)
            case "APPEND":
                item = pop()
                typed(top(), list).append(item)
            case "APPENDS":
                items = take()
                typed(top(), list).extend(items)
            case "EMPTY_DICT":
                piles[-1].append({})
            case "DICT":
                items = take()
                piles[-1].append(update({}, _pairs(items)))
            case "SETITEM":
                value, key = pop(), pop()
                update(typed(top(), dict), [(key, value)])
            case "SETITEMS":
                items = take()
                update(typed(top(), dict), _pairs(items))
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                key = len(memo) if argument is None else argument
                memo[key] = top()
                if type(memo[key]) is Unbuilt:
                    memo[key].memo_keys.append(key)
            case "GET" | "BINGET" | "LONG_BINGET":
                if argument not in memo:
                    raise Refused(DAMAGED)
                piles[-1].append(memo[argument])
            case "GLOBAL":
                piles[-1].append(find_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = pop(), pop()
                piles[-1].append(find_global(typed(module, str), typed(name, str)))
            case "REDUCE":
                arguments, function = pop(), pop()
                value = _call(function, arguments)
                allowance = _spent(allowance, _size(value))
                piles[-1].append(value)
            case "BUILD":
                state, value = pop(), top()
                if type(value) is Unbuilt:
                    built = build(value, typed(state, tuple))
                    allowance = _spent(allowance, _size(built))
                    piles[-1][-1] = built
                    memo.update(dict.fromkeys(value.memo_keys, built))
                    value.memo_keys.clear()
                # The versions that `state_dict()` records are an attribute of its dictionary.
                elif type(value) is not dict or typed(state, dict).keys() != {"_metadata"}:
                    raise Refused(f"sets attributes of a {kind(value)}")
            case "BINPERSID":
                piles[-1].append(find_storage(pop(), storages, make_storage))
            case name:
                name += f" {shown(argument)}" if type(argument) is str else ""
                raise Refused(f"uses pickle's operation {name}; only plain containers are read")
    raise Refused(DAMAGED)


def _operations(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    # Unknown operations, counts beyond the end, numbers that no C integer holds and undecodable
    # text; where warnings are errors, escapes that no text has.
    with damage(ValueError, OverflowError, struct.error, DeprecationWarning):
        for operation, argument, _ in pickletools.genops(stream):
            yield operation.name, argument


def _pairs(items: list) -> Iterable[tuple]:
    if len(items) % 2:
        raise Refused(DAMAGED)
    return zip(items[::2], items[1::2], strict=True)


def _call(function: Any, arguments: Any) -> Any:
    # Functions come from `GLOBALS` alone.
    code, defaults = typed(function, FunctionType).__code__, function.__defaults__ or ()
    number = len(typed(arguments, tuple))
    if not code.co_argcount - len(defaults) <= number <= code.co_argcount:
        raise Refused(f"is damaged: it calls a function with {number} arguments")
    return function(*arguments)


def _size(made: Any) -> int:
    # An entry of a dictionary takes about 100 bytes.
    if type(made) is dict:
        return 100 * len(made)
    return getattr(made, "nbytes", len(made) if type(made) is bytes else 0)


def _spent(allowance: int, size: int) -> int:
    if size > allowance:
        raise Refused("is a pickle that multiplies its own bytes")
    return allowance - size


def check_plain(value: Any) -> None:
    """Refuses values that are not plain, contain themselves, nest deep or multiply by sharing."""
    # Id of a container to (depth, values inside); `entered` are those being measured.
    measured: dict[int, tuple[int, int]] = {}
    entered: set[int] = set()
    todo = [(value, False)]
    while todo:
        item, is_left = todo.pop()
        if type(item) not in (dict, list, tuple):
            plain = (str, bytes, int, float, bool, NoneType, np.ndarray)
            if type(item) not in plain and not isinstance(item, np.generic):
                raise Refused(f"holds a {kind(item)} outside of any array")
            continue
        inside = item.values() if type(item) is dict else item
        if is_left:
            below = [measured.get(id(child), (0, 0)) for child in inside]
            depth = 1 + max((depth for depth, _ in below), default=0)
            number = len(item) + sum(number for _, number in below)
            if depth > MAX_DEPTH:
                raise Refused(f"nests containers more than {MAX_DEPTH} deep")
            if number > MAX_VALUES:
                raise Refused("holds more values than can be traversed")
            measured[id(item)] = depth, number
            entered.remove(id(item))
        elif id(item) in entered:
            raise Refused("has a container that contains itself")
        elif id(item) not in measured:
            entered.add(id(item))
            todo.append((item, True))
            todo.extend((child, False) for child in inside)
