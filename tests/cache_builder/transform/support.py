"""The commands in this process, and what tests ask of the caches that they make."""

from functools import partial

from cache_builder import build, transform
from cache_builder.commit import describe_layer, layer_name, layer_store
from cache_builder.commit import write_manifest as finish_store
from cache_builder.formats import Codebook, TokenCache
from cache_builder.formats.manifest import CacheManifest
from cache_builder.formats.plan import BuildPlan
from cache_builder.planning import LayerSpec, settle_layer
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.stores import open_store
from cache_builder.verify import run as verify
from tests import factories

LAYOUTS = ["webdataset", "zarr"]
OTHER = {"webdataset": "zarr", "zarr": "webdataset"}


def here(command, options, progress=None):
    """Run a command in this process: what Ray does with units is tested elsewhere."""
    return command(options._replace(cluster=ClusterOptions(num_workers=0)), progress)


convert, merge, subset = (
    partial(here, each) for each in (transform.convert, transform.merge, transform.subset)
)


def samples_of(cache_dir):
    with TokenCache.open(cache_dir) as cache:
        return {sample.key: sample for sample in map(cache.__getitem__, range(len(cache)))}


def assert_whole(cache_dir, num_samples):
    report = verify(cache_dir, retokenize=100, device="cpu")
    assert report.problems == []
    assert report.num_samples == num_samples
    (again,) = report.retokenized.values()
    assert (again.num_images, again.num_different) == (num_samples, 0)


def extend(cache_dir, num_views):
    """Add views to a finished cache, as a layer below it."""
    store = open_store(cache_dir)
    plan = factories.read(BuildPlan, cache_dir, "plan.json")
    views = plan.spec.view_spec
    later = views.model_copy(update={"first_view": views.num_views, "num_views": num_views})
    spec = plan.spec.model_copy(update={"view_spec": later, "images_in_cache": "none"})
    name = layer_name(spec)
    codebook = Codebook.load(cache_dir / "codebook.safetensors")
    below = layer_store(store, name)
    layer = settle_layer(below, plan, LayerSpec(name, spec, codebook))
    worker = factories.make_worker(cache_dir, plan, names=(name,))
    for unit in range(plan.num_units):
        worker.run(unit)
    manifest = finish_store(below, layer, factories.read_summaries(below, plan.num_units))
    build.publish_layers(store, (describe_layer(name, manifest),))


def rename_classes(cache, names):
    """Give a cache other class names, in its plan and its manifest."""
    store = open_store(cache)
    for model, name in ((BuildPlan, "plan.json"), (CacheManifest, "manifest.json")):
        there = factories.read(model, cache, name)
        spec = there.spec.model_copy(update={"class_names": names})
        content = there.model_copy(update={"spec": spec}).model_dump_json()
        store.publish(name, content.encode())
