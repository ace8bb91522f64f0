"""The server against real clients and against stock mlx-lm."""

import concurrent.futures
import json
import socket
import threading
import time

from tempo_mlx.models import PositionedModel
from tempo_mlx.server.app import application
from tempo_mlx.server.engine import Engine

import mlx.core as mx
import numpy as np
import pytest

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

MODEL = "smollm2-135m"
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def engine(embedded):
    engine = Engine(PositionedModel.of(embedded[0]), embedded[1], MODEL, batch_size=8, max_queue=40)
    engine.start()
    yield engine
    engine.stop()


def serving(app):
    """A server on a free port, on a thread of its own; (address, how to end it)."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # clients that come before the server has started wait for it
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()

    def end():
        server.should_exit = True
        thread.join()

    return f"http://127.0.0.1:{listener.getsockname()[1]}", end


@pytest.fixture(scope="module")
def address(engine):
    address, end = serving(application(engine))
    yield address
    end()


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def http(address):
    with httpx.Client(base_url=address, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def stock(embedded):
    """log p [T, V] of each token's successors, by stock mlx-lm, in float64."""
    model, _ = embedded

    def logprobs(ids):
        logits = np.array(model(mx.array(ids)[None])[0].astype(mx.float32), np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    return logprobs


def greedy(stock, ids, n):
    ids = list(ids)
    for _ in range(n):
        ids.append(int(stock(ids)[-1].argmax()))
    return ids


def test_models_are_listed_and_health_is_told(client, http):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert http.get("/health").json() == {"status": "ok"}
    assert "tempo_mlx_requests_total" in http.get("/metrics").text


def test_a_greedy_completion_is_what_stock_mlx_lm_says(client, embedded, stock):
    tokenizer = embedded[1]
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3, echo=True
    )
    prompt = tokenizer.encode(PROMPT)
    ids = greedy(stock, prompt, 8)
    assert answer.choices[0].text == tokenizer.decode(ids)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 8)
    told, expected = answer.choices[0].logprobs, stock(ids)
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    for place in range(1, len(ids)):
        logprob = expected[place - 1][ids[place]]
        assert told.token_logprobs[place] == pytest.approx(logprob, abs=1e-4)
        assert len(told.top_logprobs[place]) == 3
        best = np.sort(expected[place - 1])[::-1][:3]
        assert sorted(told.top_logprobs[place].values(), reverse=True) == pytest.approx(
            best.tolist(), abs=1e-4
        )
        token = told.tokens[place]
        if token in told.top_logprobs[place]:
            assert told.top_logprobs[place][token] == told.token_logprobs[place]
        assert answer.choices[0].text[told.text_offset[place] :].startswith(token)


def test_zero_tokens_and_echo_score_a_prompt_of_ids(client, embedded, stock):
    prompts = [embedded[1].encode(text) for text in ("The cat sat on the mat.", "A dog")]
    answer = client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=0, temperature=0, logprobs=1, echo=True
    )
    for ids, choice in zip(prompts, answer.choices, strict=True):
        expected = stock(ids)
        found = choice.logprobs.token_logprobs
        assert found[0] is None and len(found) == len(ids)
        for place in range(1, len(ids)):
            assert found[place] == pytest.approx(expected[place - 1][ids[place]], abs=1e-4)


def test_n_at_temperature_zero_are_the_best_distinct_texts(client, embedded, stock):
    answer = client.completions.create(
        model=MODEL, prompt="The cat", max_tokens=3, temperature=0, n=4, logprobs=0
    )
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) == 4
    totals = [sum(choice.logprobs.token_logprobs) for choice in answer.choices]
    assert totals == sorted(totals, reverse=True)
    prompt = embedded[1].encode("The cat")
    # Beam search by hand, four texts wide.
    beam = [(0.0, [])]
    for _ in range(3):
        grown = []
        for score, ids in beam:
            row = stock([*prompt, *ids])[-1]
            grown += [(score + row[i], [*ids, int(i)]) for i in np.argsort(-row)[:4]]
        beam = sorted(grown, key=lambda one: -one[0])[:4]
    assert texts == [embedded[1].decode(ids) for _, ids in beam]
    assert totals == pytest.approx([score for score, _ in beam], abs=1e-3)


def test_samples_follow_their_seed(client):
    def draw(seed):
        answer = client.completions.create(
            model=MODEL, prompt=["The cat", "A dog"], max_tokens=5, temperature=0.9, n=3, seed=seed
        )
        assert [choice.index for choice in answer.choices] == list(range(6))
        return [choice.text for choice in answer.choices]

    first = draw(3)
    assert first == draw(3) != draw(4)
    assert len(set(first[:3])) > 1


def test_a_stream_is_the_answer_in_pieces(client):
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**asked)
    chunks = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    told = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(one.text for one in told) == whole.choices[0].text
    logprobs = [each for one in told if one.logprobs for each in one.logprobs.token_logprobs]
    assert logprobs == pytest.approx(whole.choices[0].logprobs.token_logprobs, abs=1e-5)
    assert [one.finish_reason for one in told if one.finish_reason] == ["length"]
    assert chunks[-1].usage == whole.usage
    assert len(told) > 3


@pytest.mark.parametrize("stop", ["city", ["xyz", " of"], "Nova Haven was"])
def test_a_stream_ends_before_a_stop_text(client, stop):
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "stop": stop}
    whole = client.completions.create(**asked).choices[0]
    told = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    assert "".join(one.text for one in told) == whole.text
    assert told[-1].finish_reason == whole.finish_reason == "stop"
    assert not any(text in whole.text for text in ([stop] if isinstance(stop, str) else stop))


def test_chat_is_the_template_completed(client, embedded, stock):
    messages = [{"role": "user", "content": "Say hello."}]
    ids = embedded[1].apply_chat_template(messages, add_generation_prompt=True)
    asked = {"model": MODEL, "messages": messages, "max_tokens": 6, "temperature": 0}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    expected = greedy(stock, ids, 6)
    assert answer.choices[0].message.content == embedded[1].decode(expected[len(ids) :])
    rows = stock(expected)
    for place, token in enumerate(answer.choices[0].logprobs.content, len(ids)):
        assert token.logprob == pytest.approx(rows[place - 1][expected[place]], abs=1e-4)
        assert bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 2
    told = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    assert told[0].delta.role == "assistant"
    text = "".join(one.delta.content or "" for one in told)
    assert text == answer.choices[0].message.content


def test_a_schema_is_followed(client):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "maximum": 99}},
        "required": ["age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "How old are you?"}],
        max_tokens=30,
        temperature=0,
        response_format=form,
    )
    assert 0 <= json.loads(answer.choices[0].message.content)["age"] <= 99


def test_a_lattice_comes_step_by_step(client, http):
    body = {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": 5,
        "tempo": {"threshold": 0.1, "return": "lattice"},
    }
    whole = http.post("/v1/completions", json=body).json()["choices"][0]
    steps = []
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                steps += [
                    choice["tempo"]
                    for choice in json.loads(line[6:])["choices"]
                    if "tempo" in choice
                ]
    assert [step["step"] for step in steps] == list(range(5))
    assert [[t["id"] for t in step["tokens"]] for step in steps] == [
        [t["id"] for t in step["tokens"]] for step in whole["tempo"]["steps"]
    ]
    assert whole["text"] == whole["tempo"]["text"]


@pytest.mark.parametrize(
    "bad, param, words",
    [
        ({"suffix": "x"}, "suffix", "unknown field"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": [10**6]}, "prompt", "1000000"),
        ({"n": 3, "best_of": 2}, "best_of", "at least n"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"tempo": {"visibility": "nope"}}, "visibility", "nope"),
        ({"tempo": {"colour": 1}}, "tempo.colour", "unknown field"),
        ({"logit_bias": {"cat": 1}}, "logit_bias", "token ids"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
        ({"regex": "[0-"}, "regex", "regex"),
        ({"stream": True, "echo": True}, "echo", "stream"),
        ({"prompt": "x" * 200_000}, None, "tokens"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client, bad, param, words):
    with pytest.raises(openai.APIStatusError) as raised:
        client.completions.create(model=MODEL, prompt="x", extra_body=bad)
    assert raised.value.status_code == 400
    assert words in raised.value.body["message"]
    assert param is None or raised.value.body["param"] == param


def test_another_model_another_route_and_no_json(client, http):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-5", prompt="x")
    assert http.get("/v1/nothing").json()["error"]["message"] == "there is no GET /v1/nothing"
    assert http.get("/v1/completions").status_code == 405
    for body in (b"{", b"\xff", b"[1]", b"[" * 100_000):
        answer = http.post("/v1/completions", content=body)
        assert answer.status_code == 400, body[:10]
    assert http.post("/v1/completions", content=b"x" * (33 * 2**20)).status_code == 413
    assert http.get("/health").status_code == 200


def test_scores_and_tokens(http, embedded):
    from tempo_mlx import ContinuationScorer

    body = {"model": MODEL, "contexts": ["It is", "He was"], "candidates": [["hot", "so"], ["a"]]}
    scores = http.post("/v1/score", json=body).json()["scores"]
    scorer = ContinuationScorer(*embedded)
    expected = scorer.score_continuations(body["contexts"], body["candidates"])
    for found, own in zip(scores, expected, strict=True):
        assert found == pytest.approx(own, abs=1e-4)
    ids = http.post("/tokenize", json={"prompt": "The cat"}).json()["tokens"]
    assert ids == embedded[1].encode("The cat")
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "The cat"}
    assert http.get("/tokenizer_info").json()["eos_token_ids"]


def test_lists_are_ranked_again(http, embedded, stock):
    texts = ["he is hear", "he is here"]
    lists = [
        {"utt": "a", "nbest": [{"text": text, "ac": -5.0 - i} for i, text in enumerate(texts)]}
    ]
    body = {"model": MODEL, "lists": lists, "weights": {"alpha": 1.0}, "end": False}
    [found] = http.post("/v1/rescore", json=body).json()["lists"]
    totals = {}
    for i, text in enumerate(texts):
        ids = [min(embedded[1].eos_token_ids), *embedded[1].encode(text)]
        rows = stock(ids)
        totals[text] = -5.0 - i + sum(rows[at - 1][ids[at]] for at in range(1, len(ids)))
    assert found["best"] == max(totals, key=totals.get)
    for each in found["nbest"]:
        assert each["total"] == pytest.approx(totals[each["text"]], abs=1e-4)
    for bad, name in (
        ({"lists": []}, "lists"),
        ({"weights": {"beta": 1}}, "weights.beta"),
        ({"lists": [{"nbest": [{"text": "a", "am": 1}]}]}, "lists.0.nbest.0.am"),
    ):
        answer = http.post("/v1/rescore", json=body | bad)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def test_many_clients_get_what_each_gets_alone(client):
    prompts = ["The cat", "A dog", "Once upon a time", "In 1984"] * 2

    def ask(prompt):
        asked = {"model": MODEL, "prompt": prompt, "max_tokens": 6, "temperature": 0}
        return client.completions.create(**asked).choices[0].text

    alone = {prompt: ask(prompt) for prompt in set(prompts)}
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, prompts)) == [alone[prompt] for prompt in prompts]


def test_the_next_turn_of_a_conversation_reads_what_is_new(client, http):
    messages = [{"role": "user", "content": "Name a colour, one word, nothing else."}]
    asked = {"model": MODEL, "max_tokens": 5, "temperature": 0, "stop": ["."]}
    first = client.chat.completions.create(**asked, messages=messages)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "Another one."},
    ]
    second = client.chat.completions.create(**asked, messages=messages)
    new = second.usage.prompt_tokens - second.usage.prompt_tokens_details.cached_tokens
    assert 0 < new < second.usage.prompt_tokens - first.usage.prompt_tokens + 2
    streamed = client.chat.completions.create(
        **asked, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = streamed
    assert last.usage.prompt_tokens_details.cached_tokens == second.usage.prompt_tokens - 1
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == second.choices[0].message.content
    assert "tempo_mlx_cached_tokens_total" in http.get("/metrics").text


def test_a_client_that_leaves_frees_its_place(http, engine):
    before = engine.counts.cancelled
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4000, "temperature": 0, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as stream:
        next(stream.iter_lines())
    while engine.counts.cancelled == before:
        time.sleep(0.01)
    while engine.status.running:
        time.sleep(0.01)


def test_a_full_queue_says_so(embedded):
    engine = Engine(PositionedModel.of(embedded[0]), embedded[1], MODEL, batch_size=1, max_queue=0)
    engine.start()
    address, end = serving(application(engine))
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4000, "temperature": 0, "stream": True}
    with httpx.Client(base_url=address, timeout=60) as http:
        with http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()  # kept, because a closed iterator closes the connection
            next(lines)
            refused = http.post("/v1/completions", json=body | {"stream": False})
            assert refused.status_code == 429 and refused.headers["retry-after"]
        while engine.status.running:
            time.sleep(0.01)
        assert (
            http.post("/v1/completions", json=body | {"stream": False, "max_tokens": 1}).status_code
            == 200
        )
    end()
    engine.stop()
    assert not engine.alive


def test_an_error_belongs_to_its_request(embedded, monkeypatch):
    engine = Engine(PositionedModel.of(embedded[0]), embedded[1], MODEL)
    engine.start()
    address, end = serving(application(engine))
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2, "temperature": 0}
    with httpx.Client(base_url=address, timeout=60) as http:
        with monkeypatch.context() as patch:
            patch.setattr(engine._scheduler, "tick", lambda: 1 / 0)
            failed = http.post("/v1/completions", json=body)
        assert failed.status_code == 500 and "division" in failed.json()["error"]["message"]
        assert http.post("/v1/completions", json=body).status_code == 200
        engine.stop()
        assert http.get("/health").status_code == 503
        assert http.post("/v1/completions", json=body).status_code == 503
    end()


def test_keys_hosts_and_origins(engine):
    app = application(engine, "secret", ["https://page.example"], frozenset({"127.0.0.1"}))
    address, end = serving(app)
    with httpx.Client(base_url=address) as http:
        assert http.get("/v1/models").status_code == 401
        assert http.get("/health").status_code == 200
        key = {"Authorization": "Bearer secret"}
        assert http.get("/v1/models", headers=key).status_code == 200
        assert http.get("/v1/models", headers=key | {"Host": "evil.example"}).status_code == 403
        allowed = http.get("/v1/models", headers=key | {"Origin": "https://page.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        other = http.get("/v1/models", headers=key | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
    end()
