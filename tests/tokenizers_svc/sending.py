"""Every way to send a picture and to take an answer, for the tests of the service."""

import base64
import io
import json

import msgpack
import numpy as np

BODIES = ("raw", "multipart", "json", "data URI", "msgpack", "msgpack with base64")
BATCH_BODIES = ("multipart", "json", "msgpack")
FORMS = {
    "json": "application/json",
    "npy": "application/x-npy",
    "raw": "application/octet-stream",
    "msgpack": "application/vnd.msgpack",
}


def b64(body):
    return base64.b64encode(body).decode()


def send(client, kind, body, view=None, path="/v1/tokenize", **options):
    """Send one picture; raw bodies name the view in the query, the others in the body."""
    headers = dict(options.pop("headers", {}))
    params = dict(options.pop("params", {}))
    fields = {"image": {"b64": b64(body)}} | ({"view": view} if view else {})
    if kind == "raw":
        if view:
            params["view"] = ",".join(str(int(part)) for part in view)
        return client.post(path, content=body, params=params, headers=headers)
    if kind == "multipart":
        data = {"view": ",".join(str(int(part)) for part in view)} if view else None
        files = {"file": ("a.jpg", body)}
        return client.post(path, files=files, data=data, params=params, headers=headers)
    if kind.startswith("msgpack"):
        headers["Content-Type"] = "application/vnd.msgpack"
        fields["image"] = body if kind == "msgpack" else {"b64": b64(body)}
        content = msgpack.packb(fields)
        return client.post(path, content=content, params=params, headers=headers)
    if kind == "data URI":
        fields["image"]["b64"] = f"data:image/jpeg;base64,{b64(body)}"
    return client.post(path, json=fields, params=params, headers=headers)


def send_batch(client, kind, bodies, views=None, **options):
    """Send several pictures."""
    path = "/v1/tokenize/batch"
    if kind == "multipart":
        files = [("files", (f"{i}.jpg", body)) for i, body in enumerate(bodies)]
        data = {"views": json.dumps(views)} if views else None
        return client.post(path, files=files, data=data, **options)
    views = views or [None] * len(bodies)
    if kind == "msgpack":
        items = [{"image": body, "view": view} for body, view in zip(bodies, views, strict=True)]
        headers = {"Content-Type": "application/msgpack", **options.pop("headers", {})}
        content = msgpack.packb({"items": items})
        return client.post(path, content=content, headers=headers, **options)
    items = [
        {"image": {"b64": b64(body)}, "view": view}
        for body, view in zip(bodies, views, strict=True)
    ]
    return client.post(path, json={"items": items}, **options)


def read_ids(answer):
    """The ids of an answer in any form, as an array of its shape."""
    assert answer.status_code == 200, answer.text
    kind = answer.headers["content-type"]
    if kind == FORMS["npy"]:
        return np.load(io.BytesIO(answer.content))
    if kind == FORMS["raw"]:
        shape = [int(side) for side in answer.headers["x-shape"].split(",")]
        return np.frombuffer(answer.content, answer.headers["x-dtype"]).reshape(shape)
    fields = answer.json() if kind == FORMS["json"] else msgpack.unpackb(answer.content)
    ids = [item["token_ids"] for item in fields.get("items", [fields])]
    if kind == FORMS["msgpack"]:
        ids = [np.frombuffer(of_one, "<u2") for of_one in ids]
    shape = ([len(ids)] if "items" in fields else []) + fields["shape"]
    return np.array(ids, fields["dtype"]).reshape(shape)
