"""The service as an application of a config of Ray Serve: KubeRay's RayService, `serve deploy`.

There Ray deploys and supervises, where `patchcache serve --ray` does both by itself. The config
says where the proxies listen; replicas, their limits and their health are those of `ray_serve`:

    import_path: tokenizers_svc.ray_application:application
    args:
      service: {codebooks: {photos: /codebooks/photos.safetensors}, access: {key_file: /keys}}
      num_replicas: 2
"""

from typing import Any

from pydantic import BaseModel, Field

from tokenizers_svc import ray_serve
from tokenizers_svc.access import Access, check_exposure
from tokenizers_svc.options import ServiceOptions
from tokenizers_svc.serve import with_environment


class ApplicationOptions(BaseModel, frozen=True, extra="forbid"):
    """The `args` of the application."""

    service: ServiceOptions
    num_replicas: int = Field(1, ge=1, description="how many there are")
    max_replicas: int | None = Field(
        None, ge=1, description="above `num_replicas`, then the least: as many as are needed"
    )
    gpus_per_replica: float = Field(0, ge=0, description="below 1: several replicas share a GPU")
    cpus_per_replica: float = Field(1, ge=0)
    insecure: bool = Field(False, description="serve without keys whoever reaches the proxies")


def application(options: ApplicationOptions) -> Any:
    """Return what Ray Serve runs.

    Raises:
        ConfigError: There are no keys and `insecure` is not said, or the numbers of replicas make
            no sense.
        MissingDependencyError: Ray Serve is not installed.
    """
    replicas = ray_serve.ReplicaOptions(
        num_replicas=options.num_replicas,
        max_replicas=options.max_replicas,
        gpus_per_replica=options.gpus_per_replica,
        cpus_per_replica=options.cpus_per_replica,
    )
    ray_serve.check_numbers(replicas)
    service = with_environment(options.service)
    # On a cluster others can reach the proxies, wherever the config lets them listen.
    check_exposure("0.0.0.0", Access(service.access), insecure=options.insecure)
    return ray_serve.make_deployment(ray_serve.import_serve(), service, replicas).bind()
