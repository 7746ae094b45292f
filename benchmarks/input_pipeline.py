"""Speed of the host's input path on MMEB-like pairs, against transformers' processor.

    python benchmarks/input_pipeline.py [--pairs 200] [--model llave-0.5b] [--tokenizer DIR]
    python benchmarks/input_pipeline.py --workers 0 1 2 4    # the whole stream, by worker processes
    python benchmarks/input_pipeline.py --memory --rows 50000 [--workers 2]  # memory over an epoch

Pairs have the image sizes and text lengths of `llave_jax.planning.workload`; photographs are cut from the
two that scikit-learn ships, so that JPEG decoding does realistic work. Rates are per second of CPU
time, which other work on the machine hardly changes; both sides run in one thread. The peer is
LlavaOnevisionProcessor with the same canvases, to uint8-exact Pillow crops and, if torchvision is
installed, with its torch backend; it needs the `torch` of the parity tests.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import PIL.Image
import transformers
from transformers.utils.import_utils import is_torchvision_available

from llave_jax.data.pipeline import train_iterator
from llave_jax.inputs import anyres, chat
from llave_jax.inputs.batch import Budget
from llave_jax.inputs.config import InputSpec
from llave_jax.inputs.images import load_image
from llave_jax.inputs.packing import Packer
from llave_jax.inputs.sequence import SequenceBuilder
from llave_jax.models.config import PRESETS
from llave_jax.planning import workload
from llave_jax.planning.assumed_pairs import WORDS, AssumedPairs

# That the tiny model cuts long texts is no news; set here, worker processes keep to it too.
logging.getLogger("llave_jax.inputs.sequence").setLevel(logging.ERROR)


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """Least CPU time of several runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def budget_for(spec: InputSpec, pairs: int) -> Budget:
    sizes = workload.sample_pairs(spec, 2000)
    rows = -(-int(1.1 * pairs * sizes.lengths.sum(1).mean()) // 4096)
    crops = int(1.1 * pairs * sizes.crops.sum(1).mean())
    return Budget(rows=max(rows, 4), row_length=4096, crops=max(crops, 10), groups=pairs)


def compare(source: AssumedPairs, builder: SequenceBuilder, repeats: int) -> None:
    """One core: our path by stages, then the peer's on the same items."""
    spec = builder.spec
    items = [item for i in range(len(source)) for item in (source[i].query, source[i].target)]
    images = [image for item in items for image in item.images if image is not None]
    decoded = [load_image(image) for image in images]
    sequences = [builder(item) for item in items]
    layout = (spec.config, spec.crop)
    budget = budget_for(spec, 8)

    def pack() -> None:
        packer = Packer(budget, 1, spec.crop)
        for query, target in zip(sequences[::2], sequences[1::2], strict=True):
            if not packer.add([query, target]):
                packer.emit()
                packer.add([query, target])

    contents = [chat.place_markers(item.text, len(item.images)) for item in items]
    tokenizer = builder.tokenizer
    stages = {
        "decode": lambda: [load_image(image) for image in images],
        "resize and tile": lambda: [anyres.image_crops(i, *layout) for i in decoded],
        "layout": lambda: [anyres.image_taps(*i.size, *layout) for i in decoded],
        "tokenise": lambda: [chat.chat_ids(tokenizer, content) for content in contents],
        "all of a sequence": lambda: [builder(item) for item in items],
        "pack": pack,
    }
    print(f"{len(source)} pairs, {len(images)} images, {len(decoded)} decoded in one thread")
    seconds = {name: cpu_seconds(work, repeats) for name, work in stages.items()}
    total = seconds["all of a sequence"] + seconds["pack"]
    for name, value in seconds.items():
        print(f"  {name:20}{1000 * value / len(source):8.2f} ms a pair{value / total:8.1%}")
    kernel = (seconds["decode"] + seconds["resize and tile"]) / total
    print(f"  decoding and resizing are {kernel:.1%} of the whole")
    report("llave_jax, packed", total, len(images), len(source), total)
    compare_peers(source, items, images, builder, repeats, total)


def report(name: str, seconds: float, images: int, pairs: int, ours: float) -> None:
    print(
        f"{name:42}{images / seconds:8.1f} images/s{pairs / seconds:8.1f} pairs/s a core"
        f"{seconds / ours:8.2f} x our time"
    )


def compare_peers(source, items, images, builder, repeats, ours) -> None:
    import torch

    class Peer(transformers.LlavaOnevisionProcessor):
        def check_argument_for_proper_class(self, argument_name, argument):
            """Without torchvision there is no class of video processors to compare with."""
            return type(argument)

    torch.set_num_threads(1)
    for name, image_processor in peers(builder.spec):
        processor = Peer(
            image_processor=image_processor,
            tokenizer=builder.tokenizer,
            video_processor=None,
            num_image_tokens=builder.spec.crop.num_patches,
            vision_feature_select_strategy="full",
            image_token="<image>",
        )

        def run(processor=processor) -> None:
            for item in items:
                content = chat.place_markers(item.text, len(item.images))
                opened = [PIL.Image.open(io.BytesIO(i)).convert("RGB") for i in item.images]
                text = chat.chat_text(content)
                processor(images=opened or None, text=text, return_tensors="pt")  # pyright: ignore[reportCallIssue]

        seconds = cpu_seconds(run, repeats)
        report(f"LlavaOnevisionProcessor, {name}", seconds, len(images), len(source), ours)
        print(f"  {same_crops(images, image_processor, builder.spec)}")


def peers(spec: InputSpec) -> list[tuple[str, object]]:
    size = {"height": spec.crop.size, "width": spec.crop.size}
    options = {"size": size, "image_grid_pinpoints": [list(p) for p in spec.config.pinpoints]}
    found: list[tuple[str, object]] = [
        ("Pillow", transformers.LlavaOnevisionImageProcessorPil(**options))
    ]
    if is_torchvision_available():
        found.append(("torchvision", transformers.LlavaOnevisionImageProcessor(**options)))
    return found


def same_crops(images: list[bytes], image_processor, spec: InputSpec) -> str:
    """How many uint8 crops of the peer equal ours."""
    equal = total = largest = 0
    for data in images:
        image = load_image(data)
        pixels = np.asarray(image_processor(image, return_tensors="np")["pixel_values"])[0]
        mean, std = np.float32(image_processor.image_mean), np.float32(image_processor.image_std)
        theirs = np.rint((np.moveaxis(pixels, 1, -1) * std + mean) * 255).astype(int)
        ours = anyres.image_crops(image, spec.config, spec.crop).astype(int)
        difference = np.abs(theirs[: len(ours)] - ours).reshape(len(ours), -1).max(1)
        equal += int((difference == 0).sum())
        total += len(ours)
        largest = max(largest, int(difference.max()))
    return f"{equal} of {total} uint8 crops equal ours, largest difference {largest}"


def scale(source: AssumedPairs, builder: SequenceBuilder, workers: list[int], pairs: int) -> None:
    """The whole stream in wall-clock time, after the first batches, and the CPU time it takes.

    This process's part is what does not grow with workers: receiving crops and packing.
    """
    for count in workers:
        iterator = train_iterator(
            source, builder, budget_for(builder.spec, 8), seed=0, num_shards=1, num_workers=count
        )
        for _ in range(3):
            next(iterator)
        start, used, done = time.monotonic(), cpu_used(), 0
        while done < pairs:
            done += int(next(iterator).packed.valid.sum())
        seconds = time.monotonic() - start
        own, theirs = 1000 * (cpu_used() - used) / done
        iterator.close()
        print(
            f"{count} worker processes: {done / seconds:.1f} pairs/s, {done} pairs; CPU time a pair "
            f"{own:.1f} ms here, {theirs:.1f} ms in workers",
            flush=True,
        )


def cpu_used() -> np.ndarray:
    """Seconds of CPU time so far: of this process, and of its worker processes."""
    ticks = 0
    for process in active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return np.array([time.process_time(), ticks / os.sysconf("SC_CLK_TCK")])


def memory(builder: SequenceBuilder, rows: int, workers: int) -> None:
    """Resident memory over an epoch, with pictures an eighth as wide and high.

    Of this process, and of each of its worker processes (pages they share count in each).
    """
    source = AssumedPairs(rows, 4, shrink=8)
    budget = budget_for(builder.spec, 8)
    iterator = train_iterator(
        source, builder, budget, seed=0, num_shards=1, epochs=1, num_workers=workers
    )
    done, shown, start = 0, 0, time.monotonic()
    for batch in iterator:
        done += int(batch.packed.valid.sum())
        if done >= shown or done == rows:
            seconds = time.monotonic() - start
            print(f"{done:8} pairs, {seconds:5.0f} s: {resident()}", flush=True)
            shown += rows // 20
    print(
        f"largest of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB"
    )


def resident() -> str:
    """Resident memory of this process and of its children."""
    folders = [Path("/proc/self"), *(Path(f"/proc/{p.pid}") for p in active_children())]
    pages = [int((folder / "statm").read_text().split()[1]) for folder in folders]
    return " + ".join(f"{n * resource.getpagesize() >> 20}" for n in pages) + " MiB"


def make_builder(name: str, tokenizer: Path | None) -> SequenceBuilder:
    if tokenizer is None:
        return SequenceBuilder(words_tokenizer(), PRESETS[name].input_spec)
    return SequenceBuilder(
        transformers.AutoTokenizer.from_pretrained(tokenizer), PRESETS[name].input_spec
    )


def words_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A small byte-level BPE trained on the spot; the real one's speed is about the same."""
    from tokenizers import ByteLevelBPETokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([" ".join(WORDS)] * 10, vocab_size=600, special_tokens=special)
    with tempfile.TemporaryDirectory() as folder:
        bpe.save(f"{folder}/tokenizer.json")
        return transformers.PreTrainedTokenizerFast(
            tokenizer_file=f"{folder}/tokenizer.json",
            pad_token=special[0],
            additional_special_tokens=special[1:3],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="llave-0.5b", choices=list(PRESETS))
    parser.add_argument(
        "--tokenizer", type=Path, help="a tokenizer's folder; a small one by default"
    )
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--images", type=int, default=4, help="different images of each size")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="*", help="measure the stream instead")
    parser.add_argument("--memory", action="store_true", help="watch memory over an epoch instead")
    parser.add_argument("--rows", type=int, default=50_000, help="with --memory")
    args = parser.parse_args()
    print(f"{platform.machine()}, {cpu_name()}, Pillow {PIL.__version__}")
    builder = make_builder(args.model, args.tokenizer)
    if args.memory:
        memory(builder, args.rows, args.workers[0] if args.workers else 0)
        return
    source = AssumedPairs(args.pairs, args.images)
    if args.workers:
        scale(source, builder, args.workers, 2 * args.pairs)
    else:
        compare(source, builder, args.repeats)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return "unknown processor"


if __name__ == "__main__":
    main()
