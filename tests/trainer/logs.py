"""What a run has written into its log."""

import json


def read_rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    return {row["step"]: row["loss"] for row in read_rows(out)}
