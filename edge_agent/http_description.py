"""What OpenAPI says of the HTTP API beyond what its code says."""

from __future__ import annotations

from typing import Any

from edge_agent.answer_json import Problem

DESCRIPTION = """\
The body is one picture (JPEG, PNG, WebP), or `multipart/form-data` with several files. A picture
of any size is turned upright, resized and cut to what the network takes. Of several pictures those
that cannot be read have an `error`, the others their answer.
"""
_PICTURE = {"schema": {"type": "string", "format": "binary"}}
REQUEST: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": _PICTURE,
            "application/octet-stream": _PICTURE,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "pictures": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                        }
                    },
                }
            },
        },
    }
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": what}
    for status, what in {
        401: "No token, or a wrong one",
        403: "Under this name the device answers nobody",
        408: "The body took too long to arrive",
        413: "The body is too long",
        415: "Neither a picture nor multipart/form-data",
        422: "Not a picture, or none the network takes; or a wrong parameter",
        429: "Too much at once; Retry-After says when to come back",
        503: "No parameters to answer with yet; Retry-After says when to come back",
        504: "No answer in time",
    }.items()
}
