"""What a compiled XLA program executes: products, kernels, collectives, and XLA's own cycle estimates.

Owns reading the text of an optimised module. The body of a loop counts as often as it runs, which XLA's
`cost_analysis` does not do. Knows no models; what the numbers mean is `prediction.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
DTYPE_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_ARRAY = re.compile(r"\b(" + "|".join(DTYPE_BYTES) + r")\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
      name: without "%".
      shape: text of the shape of its result.
      opcode: such as "dot" or "fusion".
      operands: names of its operands; for a constant or a parameter, its value or number.
      attributes: the text after its operands.
      is_root: whether it is the result of its computation.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def attribute(self, key: str) -> str | None:
        """A computation that the instruction names in its attributes, as in `body=%name`.

        Args:
          key: such as "body", "condition" or "calls".

        Returns:
          The name of the computation; None if there is no such key.
        """
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found and found.group(1)

    def called(self, key: str) -> str:
        """As `attribute`, for an instruction that must have the key.

        Args:
          key: such as "body", "condition" or "calls".

        Returns:
          The name of the computation.

        Raises:
          ValueError: the instruction has no such key.
        """
        name = self.attribute(key)
        if name is None:
            raise ValueError(f"{self.opcode} {self.name} names no computation as {key!r}")
        return name


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction, with all its executions.

    Attributes:
      kind: one of COLLECTIVES.
      op_name: the traced operation that it comes from; "" if XLA gives none.
      shape: of its result on one device; several are joined by "+".
      group: devices that exchange with each other.
      count: executions.
      result_bytes: bytes of the results of all executions.
      hidden: whether XLA made it asynchronous, so that other operations run at the same time.
    """

    kind: str
    op_name: str
    shape: str
    group: int
    count: int
    result_bytes: int
    hidden: bool

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device receives in the usual ring algorithms."""
        others = (self.group - 1) / self.group
        factor = {
            "all-gather": others,
            "all-reduce": 2 * others,
            "reduce-scatter": self.group - 1,
            "all-to-all": others,
            "collective-permute": 1,
        }[self.kind]
        return factor * self.result_bytes


@dataclasses.dataclass
class Cost:
    """What one device executes in one run of the program.

    Attributes:
      product_flops: FLOPs of matrix products and convolutions outside kernels.
      kernels: name -> [(shapes of operands, executions)] of hand-written kernels.
      collectives: all exchanges between devices.
      cycles: XLA's estimate for all fusions and plain operations, on TPUs, without kernels and
        collectives.
      operations: (FLOPs of products, bytes moved, executions) of the same fusions and operations.
    """

    product_flops: float = 0
    kernels: dict[str, list[tuple[tuple[tuple[int, ...], ...], int]]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    cycles: float = 0
    operations: list[tuple[float, int, int]] = dataclasses.field(default_factory=list)

    def roofline_seconds(self, flops: float, bandwidth: float) -> float:
        """A lower bound of the time of all operations.

        Args:
          flops: FLOPs a second at which products run.
          bandwidth: bytes a second at which memory is read and written.

        Returns:
          Seconds, if each operation takes as long as its products or its bytes, whichever is longer.
        """
        return sum(
            times * max(products / flops, moved / bandwidth)
            for products, moved, times in self.operations
        )


def cost(text: str, num_devices: int) -> Cost:
    """What one device executes in one run of a program.

    Args:
      text: the optimised module, as printed by `compiled.as_text()`.
      num_devices: devices that the program runs on.

    Returns:
      The counts.

    Raises:
      ValueError: the number of runs of a loop cannot be read off its condition.
    """
    program = Program(text)
    total = Cost()
    _add(program, program.entry, 1, total, num_devices)
    return total


class Program:
    """The computations of a module.

    Attributes:
      computations: name -> instructions.
      entry: name of the computation that a run starts with.

    Args:
      text: the optimised module, as printed by `compiled.as_text()`.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY")) and line.endswith("{"):
                name = _find(r"^(?:ENTRY )?%?([\w.\-]+)", line).group(1)
                current = self.computations[name] = []
                if line.startswith("ENTRY"):
                    self.entry = name
            elif line.startswith("  ") and " = " in line:
                current.append(_parse(line))

    @functools.cache  # noqa: B019 (one program, short-lived)
    def shapes(self, computation: str) -> dict[str, str]:
        """The shapes of a computation's instructions.

        Args:
          computation: its name.

        Returns:
          Name of an instruction -> text of its shape.
        """
        return {i.name: i.shape for i in self.computations[computation]}

    def trip_count(self, loop: Instruction) -> int:
        """How often a loop runs.

        Args:
          loop: a "while" instruction.

        Returns:
          The number of runs of its body.

        Raises:
          ValueError: neither XLA nor the loop's condition says it.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known.group(1))
        condition = self.computations[loop.called("condition")]
        root = next(i for i in condition if i.is_root)
        values = {i.name: i for i in condition}
        limits = [values[name] for name in root.operands if values[name].opcode == "constant"]
        if root.opcode != "compare" or "direction=LT" not in root.attributes or len(limits) != 1:
            raise ValueError(f"loop {loop.name}: its condition is not a comparison with a constant")
        return int(limits[0].operands[0])


def _find(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"expected {pattern} in the compiled program, found {text[:200]!r}")
    return found


def _parse(line: str) -> Instruction:
    left, right = re.sub(r"/\*.*?\*/", "", line).strip().split(" = ", 1)
    is_root = left.startswith("ROOT ")
    if right.startswith("("):
        end = _closing(right, 0) + 1
    else:
        end = right.index(" ")
    shape, rest = right[:end], right[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    operands = tuple(
        part.strip().split(" ")[-1].lstrip("%") for part in rest[opening + 1 : closing].split(",")
    )
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        shape=shape,
        opcode=rest[:opening],
        operands=operands,
        attributes=rest[closing + 1 :],
        is_root=is_root,
    )


def _closing(text: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _elements(shape: str) -> list[str]:
    """The shapes of the elements of a tuple's shape."""
    elements, depth, start = [], 0, 1
    for n, character in enumerate(shape):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(character, 0)
        if (character == "," and depth == 1) or depth == 0:
            elements.append(shape[start:n])
            start = n + 1
    return elements


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays of a shape.

    Args:
      shape: text of the shape, which may be a tuple.

    Returns:
      [(dtype, dimensions)], one for each array.
    """
    return [
        (dtype, tuple(int(d) for d in dims.split(",") if d))
        for dtype, dims in _ARRAY.findall(shape)
    ]


def num_bytes(shape: str) -> int:
    """The size of a shape in memory.

    Args:
      shape: text of the shape, which may be a tuple.

    Returns:
      Bytes of all its arrays, without padding.
    """
    return sum(DTYPE_BYTES[dtype] * math.prod(dims) for dtype, dims in arrays(shape))


def _add(program: Program, computation: str, times: int, total: Cost, num_devices: int) -> None:
    shapes = program.shapes(computation)
    for i in program.computations[computation]:
        if i.opcode == "while":
            runs = times * program.trip_count(i)
            _add(program, i.called("body"), runs, total, num_devices)
            continue
        base = i.opcode.removesuffix("-start")
        if base in COLLECTIVES:
            total.collectives.append(_collective(i, base, times, num_devices))
            continue
        if _is_kernel(i):
            _add_kernel(i, shapes, times, total)
            continue
        products = 0.0
        if i.opcode in ("convolution", "dot"):
            products = _product_flops(i, shapes)
        called = i.attribute("calls") or (i.opcode == "call" and i.attribute("to_apply"))
        if called and i.opcode == "fusion":
            products = _flops_within(program, called)
        total.product_flops += times * products
        if called and i.opcode == "fusion":
            # XLA may fuse a kernel with the operations that read its results.
            kernels = [k for k in program.computations[called] if _is_kernel(k)]
            for kernel in kernels:
                _add_kernel(kernel, program.shapes(called), times, total)
            if kernels:
                continue
            if collective := _fused_collective(program, i, called, times, num_devices):
                total.collectives.append(collective)
                continue
        elif called:
            _add(program, called, times, total, num_devices)
            continue
        if i.opcode not in _MOVES_NOTHING and not i.opcode.endswith("-done"):
            total.operations.append((products, _bytes_moved(program, i, shapes), times))
        cycles = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
        if cycles:
            total.cycles += times * int(cycles.group(1))


_MOVES_NOTHING = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
    *("after-all", "partition-id", "replica-id"),
)
_SLICES = ("slice", "dynamic-slice", "gather")


def _bytes_moved(program: Program, i: Instruction, shapes: dict[str, str]) -> int:
    """Bytes that an operation reads and writes.

    If it reads only slices of an operand, the slices count. If it updates an operand in place, the update
    counts.
    """
    if i.opcode != "fusion":
        within, results = [i], [i]
        names = list(i.operands)
    else:
        within = program.computations[i.called("calls")]
        parameters = {int(k.operands[0]): k.name for k in within if k.opcode == "parameter"}
        names = [parameters.get(n, "") for n in range(len(i.operands))]
        values = {k.name: k for k in within}
        (root,) = (k for k in within if k.is_root)
        results = [values[name] for name in root.operands] if root.opcode == "tuple" else [root]
    inner = program.shapes(i.called("calls")) if i.opcode == "fusion" else shapes

    moved = 0
    for name, operand in zip(names, i.operands, strict=True):
        uses = [k for k in within if name in k.operands]
        if uses and all(k.opcode in _SLICES and k.operands[0] == name for k in uses):
            moved += sum(num_bytes(k.shape) for k in uses)
        elif not (uses and all(_updates(k) == name for k in uses)):
            moved += num_bytes(shapes.get(operand, ""))
    for result in results:
        update = _updates(result) is not None
        moved += num_bytes(inner[result.operands[1]] if update else result.shape)
    return moved


def _updates(i: Instruction) -> str | None:
    """The operand that an operation updates in place; None if there is none."""
    return i.operands[0] if i.opcode == "dynamic-update-slice" else None


# Targets of the custom calls of hand-written kernels: of TPUs, and of GPUs in older and newer jax.
_KERNEL_CALLS = re.compile(
    r'custom_call_target="(tpu_custom_call|__gpu\$xla\.gpu\.triton|triton_kernel_call_ffi)"'
)


def _is_kernel(i: Instruction) -> bool:
    return i.opcode == "custom-call" and bool(_KERNEL_CALLS.search(i.attributes))


def _add_kernel(i: Instruction, shapes: dict[str, str], times: int, total: Cost) -> None:
    operands = tuple(arrays(shapes[name])[0][1] for name in i.operands)
    # On TPUs the instruction is named after the kernel, on GPUs only its op_name is.
    traced = re.search(r'op_name="[^"]*?(\w+)/pallas_call"', i.attributes)
    name = re.sub(r"[.\d]+$", "", i.name)
    if name == "pallas_call" and traced:
        name = traced.group(1)
    total.kernels[name].append((operands, times))


def _flops_within(program: Program, computation: str) -> float:
    flops = 0.0
    shapes = program.shapes(computation)
    for i in program.computations[computation]:
        if i.opcode in ("convolution", "dot"):
            flops += _product_flops(i, shapes)
        elif i.opcode == "fusion":
            flops += _flops_within(program, i.called("calls"))
    return flops


def _product_flops(i: Instruction, shapes: dict[str, str]) -> float:
    left, right = (arrays(shapes[name])[0][1] for name in i.operands)
    result = arrays(i.shape)[0][1]
    if i.opcode == "dot":
        contracted = _find(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes).group(1)
        return 2 * math.prod(result) * math.prod(left[int(d)] for d in contracted.split(",") if d)
    return _convolution_flops(i, left, right, result)


def _convolution_flops(i: Instruction, left, right, result) -> float:
    """FLOPs of a convolution. TPUs write all products as convolutions.

    A position of the window counts only where it meets an element of the (dilated) input.
    """
    labels = _find(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes).groups()
    lhs, rhs, out = (dict(zip(text, dims, strict=True)) for text, dims in
                     zip(labels, (left, right, result), strict=True))  # fmt: skip
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", _window(i.attributes)))
    pairs = 1
    spatial = sorted(key for key in rhs if key.isdigit())
    for n, key in enumerate(spatial):

        def setting(name: str, default: str, n: int = n) -> str:
            return window[name].split("x")[n] if name in window else default

        stride = int(setting("stride", "1"))
        low = int(setting("pad", "0_0").split("_")[0])
        spread, reach = int(setting("lhs_dilate", "1")), int(setting("rhs_dilate", "1"))
        pairs *= _window_hits(lhs[key], rhs[key], out[key], stride, low, spread, reach)
    return 2 * out["b"] * out["f"] * rhs["i"] * pairs


def _window(attributes: str) -> str:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    return found.group(1) if found else ""


@functools.lru_cache(maxsize=4096)
def _window_hits(size, kernel, outputs, stride, low, spread, reach) -> int:
    count = 0
    for o in range(outputs):
        for k in range(kernel):
            at = o * stride - low + k * reach
            count += at % spread == 0 and 0 <= at // spread < size
    return count


def _collective(i: Instruction, kind: str, times: int, num_devices: int) -> Collective:
    hidden = i.opcode.endswith("-start")
    shape = i.shape
    if hidden and kind != "all-reduce":
        # The shape is a tuple: operands, results, then handles of the transfer. Operands and results are
        # tuples themselves if there are several.
        shape = _elements(shape)[1]
    # GPUs write all collectives as start and end, even those that they wait for at once.
    hidden &= '"is_sync":true' not in i.attributes
    found = arrays(shape)
    shape = "+".join(f"{dtype}[{','.join(map(str, dims))}]" for dtype, dims in found)
    op_name = re.search(r'op_name="([^"]*)"', i.attributes)
    return Collective(
        kind=kind,
        op_name=op_name.group(1) if op_name else "",
        shape=shape,
        group=_group_size(i.attributes, num_devices),
        count=times,
        result_bytes=times * num_bytes(shape),
        hidden=hidden,
    )


def _fused_collective(
    program: Program, i: Instruction, called: str, times: int, num_devices: int
) -> Collective | None:
    """The collective that a fusion stands for; None if it stands for none.

    An asynchronous collective is written three times: in the fusion that starts it, in the fusions that run
    at the same time, and in the fusion that waits for its end. Only the first counts.
    """
    collective = next((e for e in program.computations[called] if e.opcode in COLLECTIVES), None)
    if collective is None or "async_collective_fusion" in called or "-done" in i.name:
        return None
    if "-start" in i.name:
        hidden = _collective(collective, collective.opcode, times, num_devices)
        return dataclasses.replace(hidden, hidden=True)
    if "all-reduce-scatter" in called:
        # An all-reduce whose result each device cuts to its own part: the result of the fusion.
        part = dataclasses.replace(i, attributes=collective.attributes + i.attributes)
        return _collective(part, "reduce-scatter", times, num_devices)
    return _collective(collective, collective.opcode, times, num_devices)


def _group_size(attributes: str, num_devices: int) -> int:
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found.group(1).count(",") + 1
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(found.group(2))
    # mesh['a'=4,'b'=4] {'b'}: the axes in braces make the group. A list of devices may stand between them.
    mesh = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))?\s*\{([^}]*)\}"
    if found := re.search(mesh, attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found.group(2)))
    return num_devices
