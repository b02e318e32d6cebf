"""Exact k nearest neighbors: ours against faiss' flat index and against plain tiled products. Ratios of one run.

    pip install faiss-cpu   # in an environment of its own: nothing of nearfar needs it
    OMP_NUM_THREADS=2 python bench/knn.py [--memory 1280000 --queries 2000 --dim 384 --k 200 --rounds 3 --half]

All start from the same features on disk, as a store holds them, and end with the k nearest rows of every query: reading
and normalizing count for each, and so does filling faiss' index. "products" is only the matrix product, tile by
tile, and keeps nothing. Rounds alternate between the variants, each in a fresh process; the minimum of wall-clock
seconds counts, and the table has the median and, for busy machines, the minimum of processor seconds beside it. Peak
memory is what the process holds beyond the mapped file.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nearfar.eval.neighbors import neighbors


def ours(memory: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    return neighbors(memory, queries, k)[1].numpy()


def flat_index(memory: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    import faiss  # type: ignore[import-not-found]

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(memory.shape[1])
    for start in range(0, len(memory), 65536):
        part = np.array(memory[start : start + 65536], dtype=np.float32)
        faiss.normalize_L2(part)
        index.add(part)
    queries = np.array(queries, dtype=np.float32)
    faiss.normalize_L2(queries)
    found: np.ndarray = index.search(queries, k)[1]
    return found


def products(memory: np.ndarray, queries: np.ndarray, k: int) -> None:
    factor = torch.nn.functional.normalize(torch.from_numpy(queries).float(), dim=1).T.contiguous()
    out = torch.empty(4096, len(queries))
    for start in range(0, len(memory), 4096):
        part = torch.from_numpy(np.array(memory[start : start + 4096], dtype=np.float32))
        torch.mm(torch.nn.functional.normalize(part, dim=1), factor, out=out[: len(part)])


VARIANTS: dict[str, Any] = {"ours": ours, "faiss": flat_index, "products": products}


def measure(variant: str, folder: Path, k: int, queue: Any) -> None:
    """In a process of its own: seconds, peak MiB of anonymous memory beyond the libraries, neighbors."""
    memory = np.load(folder / "memory.npy", mmap_mode="r")
    queries = np.load(folder / "queries.npy")
    VARIANTS[variant](memory[:512], queries[:4], min(k, 512))  # loads what there is to load
    peak, ended, before = [0.0], threading.Event(), resident()

    def watch() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], resident() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun, begun_cpu = time.perf_counter(), time.process_time()
    found = VARIANTS[variant](memory, queries, k)
    spent, cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
    ended.set()
    watcher.join()
    if found is not None:
        np.save(folder / f"{variant}.npy", found)
    queue.put((spent, cpu, peak[0]))


def resident() -> float:
    """Memory of this process that is no mapped file, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def run(variant: str, folder: Path, k: int) -> tuple[float, float, float]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(variant, folder, k, queue))
    process.start()
    found: tuple[float, float, float] = queue.get()
    process.join()
    return found


def write_features(file: Path, rows: int, dim: int, dtype: type, seed: int) -> None:
    """Noise around 1,000 directions, as the features of a trained network lie."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(0).standard_normal((1000, dim), dtype=np.float32)
    x = np.lib.format.open_memmap(file, "w+", dtype, (rows, dim))
    for start in range(0, rows, 65536):
        part = x[start : start + 65536]
        part[:] = centers[rng.integers(0, 1000, len(part))] + 1.5 * rng.standard_normal(part.shape, dtype=np.float32)
    x.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("memory", 1_280_000), ("queries", 2000), ("dim", 384), ("k", 200), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--half", action="store_true", help="features in float16, as a store may keep them")
    args = parser.parse_args()
    variants = [name for name in VARIANTS if name != "faiss" or importlib.util.find_spec("faiss")]
    if "faiss" not in variants:
        print("faiss is not installed: ours is compared with plain products only.")
    dtype = np.float16 if args.half else np.float32
    print(f"{args.queries:,} queries, {args.memory:,} x {args.dim} {dtype.__name__}, k {args.k}, ", end="")
    print(f"{torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_features(folder / "memory.npy", args.memory, args.dim, dtype, 1)
        write_features(folder / "queries.npy", args.queries, args.dim, dtype, 2)
        seconds: dict[str, list[float]] = {variant: [] for variant in variants}
        cpus = dict.fromkeys(variants, float("inf"))
        peaks = dict.fromkeys(variants, 0.0)
        for _ in range(args.rounds):
            for variant in variants:
                spent, cpu, peak = run(variant, folder, args.k)
                seconds[variant].append(spent)
                cpus[variant] = min(cpus[variant], cpu)
                peaks[variant] = max(peaks[variant], peak)
                print(f"  {variant} {spent:.1f} s, {cpu:.1f} s of processors", flush=True)
        print("variant    minimum s   median s   minimum / faiss   processor s   peak MiB")
        for variant in variants:
            low, middle = min(seconds[variant]), statistics.median(seconds[variant])
            ratio = f"{low / min(seconds['faiss']):.2f}" if "faiss" in variants else "-"
            print(f"{variant:9} {low:10.1f} {middle:10.1f} {ratio:>17} {cpus[variant]:13.1f} {peaks[variant]:10.0f}")
        if "faiss" in variants:
            same = np.load(folder / "ours.npy") == np.load(folder / "faiss.npy")
            print(f"neighbors at the same place in both lists: {100 * same.mean():.2f} %")


if __name__ == "__main__":
    main()
