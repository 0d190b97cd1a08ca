"""What a build is going to do: `plan.json` and the plan of every unit of work.

Both are created once, before any worker starts, and never changed. What they settle for the whole
cache is its `CacheSpec`, which the manifest repeats.
"""

from typing import Any

from pydantic import (
    BaseModel,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from cache_builder.formats.manifest import FORMAT_VERSION, CacheSpec, LeavesOutUnset

_LEFT_OUT_OF_ROWS = ("extra", "refused", "span")


class BuildPlan(LeavesOutUnset, frozen=True, extra="forbid"):
    """`plan.json`: which build this directory belongs to."""

    format_version: int = FORMAT_VERSION
    spec: CacheSpec
    num_units: int = Field(gt=0)
    units_sha256: str = Field(description="of the concatenated SHA-256 of every plan unit file")
    layers: tuple[str, ...] = Field((), description="names of the layers that are built with it")


class PlanRow(BaseModel, frozen=True, extra="forbid"):
    """One sample to tokenise."""

    key: str
    source: str = Field(
        description="path within the folder, line of the list, member name within the tar or zip, "
        "or row of the Parquet file and the path that it gives"
    )
    label: int | None = None
    extra: dict[str, JsonValue] = Field(
        default_factory=dict, description="further columns of the source"
    )
    refused: str = Field("", description="why the image is not read; empty: it is")
    span: tuple[int, int] | None = Field(
        None, description="offset and bytes of a tar member's content, or of a zip member"
    )


class PlanUnit(BaseModel, frozen=True, extra="forbid"):
    """`plan/NNNNNN.json`: one unit of work."""

    unit: int = Field(ge=0)
    container: str = Field(
        "", description="tar, zip or Parquet file with the images; empty for a folder or list"
    )
    container_bytes: int | None = Field(None, description="its size when it was listed")
    rows: tuple[PlanRow, ...]

    @model_serializer(mode="wrap")
    def _leave_out_unset_of_rows(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialise(self)
        if fields["container_bytes"] is None:
            del fields["container_bytes"]
        # Not by a serializer of the row: called a million times, it takes longer than the listing.
        for row in fields["rows"]:
            for name in _LEFT_OUT_OF_ROWS:
                if not row[name]:
                    del row[name]
        return fields


def plan_unit_name(unit: int) -> str:
    """Return the name of one unit's plan."""
    return f"plan/{unit:06d}.json"
