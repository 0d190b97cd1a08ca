"""`bench_gpu` where pydantic may be missing: `make gpu-bench`."""

from tests.devices import bare

if __name__ == "__main__":
    bare.complete()
    from tests.benchmarks import bench_gpu

    bench_gpu.main()
