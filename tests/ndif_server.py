"""A stand-in for NDIF: nnsight's own reading and running of a request, where mechinterp cannot be imported.

``python ndif_server.py FOLDER`` serves the checkpoint in a folder on 127.0.0.1, and prints the port. A request may
name nothing but what `ALLOWED` has, and no builtin of `LACKING`, as on NDIF's servers.
"""

import base64
import hashlib
import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

sys.path = [path for path in sys.path if "site-packages" in path or "lib/python" in path]
sys.modules["mechinterp"] = None  # so that importing it fails

import nnsight  # noqa: E402
import torch  # noqa: E402
import zstandard  # noqa: E402
from nnsight.intervention.serialization import CustomCloudUnpickler  # noqa: E402
from nnsight.schema.request import RequestModel  # noqa: E402
from nnsight.schema.response import ResponseModel, Status  # noqa: E402
from nnsight.tracing.tracer import _saves, dec, inc  # noqa: E402

KEY = "a-key"
ALLOWED = {
    "torch",
    "nnsight",
    "numpy",
    "cloudpickle",
    "copyreg",
    "collections",
    "builtins",
    "typing",
    "math",
    "operator",
}
"""Of what NDIF's protected_environment.py lists (ndif-team/ndif at 028db44)."""
LACKING = ("exec", "compile", "open")
GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Unpickler(CustomCloudUnpickler):
    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] not in ALLOWED or (module == "builtins" and name in LACKING):
            raise ImportError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)


def answer(model: nnsight.TransformersModel, envelope: dict, blob: bytes) -> dict:
    """What a request saved; the source of its block is run as NDIF runs it."""
    if envelope["model_key"] != model.to_model_key():
        raise LookupError(f"there is no {envelope['model_key']} here")
    model._remoteable_set_env(envelope["env"])
    persistent = model._remoteable_persistent_objects()
    tracer = RequestModel.deserialize(blob, persistent, envelope["compress"], Unpickler)
    inc()
    try:
        tracer.execute(tracer.info.code)
        return {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in _saves()}
    finally:
        dec()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model: nnsight.TransformersModel
    sockets: ClassVar[dict] = {}
    lock = threading.Lock()

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, body: object) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def allowed(self) -> bool:
        if self.headers.get("ndif-api-key") == KEY:
            return True
        self.reply(401, {"detail": "no such key"})
        return False

    def do_GET(self) -> None:
        if self.path == "/whoami" and self.allowed():
            self.reply(200, {"email": None, "tags": []})
        elif self.path == "/subscribe" and self.allowed():
            self.close_connection = True
            digest = hashlib.sha1((self.headers["Sec-WebSocket-Key"] + GUID).encode()).digest()
            self.send_response(101)
            for name, value in {"Upgrade": "websocket", "Connection": "Upgrade"}.items():
                self.send_header(name, value)
            self.send_header("Sec-WebSocket-Accept", base64.b64encode(digest).decode())
            self.end_headers()
            session = str(id(self))
            self.sockets[session] = self
            self.frame(json.dumps({"session_id": session}).encode())
            self.rfile.read(1)  # until the client says that it closes

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.allowed():
            return
        boundary = b"--" + self.headers["Content-Type"].split("boundary=")[1].encode()
        parts = [part.split(b"\r\n\r\n", 1)[1][:-2] for part in body.split(boundary)[1:-1]]
        envelope = json.loads(parts[0])
        self.reply(200, ResponseModel(id="1", status=Status.RECEIVED).model_dump_json())
        socket = self.sockets[envelope["session_id"]]
        with self.lock:
            try:
                buffer = io.BytesIO()
                torch.save(answer(self.model, envelope, parts[1]), buffer)
            except Exception as error:
                said = ResponseModel(id="1", status=Status.ERROR, description=f"{type(error).__name__}: {error}")
                socket.frame(said.model_dump_json().encode())
                return
        data = buffer.getvalue()
        data = zstandard.ZstdCompressor().compress(data) if envelope["compress"] else data
        socket.frame(ResponseModel(id="1", status=Status.COMPLETED, data=data).pickle(), kind=2)

    def frame(self, data: bytes, kind: int = 1) -> None:
        self.wfile.write(bytes([128 | kind, 127]) + len(data).to_bytes(8, "big") + data)


if __name__ == "__main__":
    torch.set_num_threads(1)
    from nnsight.modeling.huggingface import _ID_CACHE

    folder = sys.argv[1]
    _ID_CACHE[folder] = "org/tiny"  # which nnsight would ask the hub for
    Handler.model = nnsight.TransformersModel(folder, task="text-generation", dispatch=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
