"""A local multiple-choice task: the numbers of brute force, and mlx-lm's accuracy."""

import json

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs the extra eval")

TASK = """
task: tempo_colours
dataset_path: json
dataset_kwargs: {{data_files: {{train: {file}, test: {file}}}}}
output_type: multiple_choice
fewshot_split: train
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""

QUESTIONS = [
    ("What colour is the sky on a clear day?", ["blue", "dark green", "brown"], 0),
    ("What colour is fresh grass?", ["purple", "green", "bright red"], 1),
    ("What colour is snow?", ["white", "black", "orange and red"], 0),
    ("What colour is a ripe banana?", ["dark blue", "grey", "yellow"], 2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the task, none of which needs a network."""
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        rows = [
            dict(zip(("question", "choices", "answer"), each, strict=True)) for each in QUESTIONS
        ]
        (folder / "colours.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / "colours.yaml").write_text(TASK.format(file=folder / "colours.jsonl"))
        yield folder


@pytest.fixture(scope="module")
def lm(embedded):
    from tempo_mlx.evaluation.model import TempoLM

    return TempoLM(*embedded)


def instance(*arguments):
    from lm_eval.api.instance import Instance

    return Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=0)


def brute(embedded, context, ids):
    """(log P of ids behind a context, whether each is the best one) by stock mlx-lm, float64."""
    whole = [*context, *ids]
    rows = np.array(embedded[0](mx.array(whole)[None])[0].astype(mx.float32), np.float64)
    rows -= np.logaddexp.reduce(rows, axis=1, keepdims=True)
    places = range(len(context), len(whole))
    best = all(rows[at - 1].argmax() == whole[at] for at in places)
    return sum(rows[at - 1][whole[at]] for at in places), best


def test_loglikelihoods_are_those_of_each_text_alone(lm, embedded):
    pairs = [("The cat sat on", " the mat"), ("The cat sat on", " a dog"), ("Once upon a", " time")]
    found = lm.loglikelihood([instance(*pair) for pair in pairs], disable_tqdm=True)
    for (context, text), (logprob, greedy) in zip(pairs, found, strict=True):
        ids = embedded[1].encode(text)
        expected, best = brute(embedded, embedded[1].encode(context), ids)
        assert logprob == pytest.approx(expected, abs=1e-4)
        assert greedy == best
    assert [greedy for _, greedy in found] == [False, False, True]
    [(alone, _)] = lm.loglikelihood([instance("", "The cat")], disable_tqdm=True)
    start = [lm.prefix_token_id]
    assert alone == pytest.approx(
        brute(embedded, start, embedded[1].encode("The cat"))[0], abs=1e-4
    )


def test_a_long_text_is_read_in_windows_that_overlap(lm, embedded, monkeypatch):
    monkeypatch.setattr(type(lm), "max_length", 6)
    ids = embedded[1].encode("one two three four five six seven eight nine ten")
    [found] = lm.loglikelihood_rolling([instance(embedded[1].decode(ids))])
    expected = brute(embedded, [lm.prefix_token_id], ids[:6])[0]
    # The last window holds as much as fits before the tokens that are left.
    expected += brute(embedded, ids[len(ids) - 7 : 6], ids[6:])[0]
    assert len(ids) <= 12 and found == pytest.approx(expected, abs=1e-4)


def test_answers_end_before_a_stop_text(lm):
    asked = {"until": ["."], "max_gen_toks": 8}
    answers = lm.generate_until([instance("Once upon a time", asked), instance("The cat", asked)])
    assert answers[0].startswith(", the city of Nova Haven")
    assert not any("." in answer for answer in answers)


@pytest.mark.slow
def test_a_task_has_mlx_lms_accuracy_and_reads_examples_once(lm, embedded, folder, run, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager
    from mlx_lm.evaluate import MLXLM

    class Stock(MLXLM):
        def __init__(self):
            super(MLXLM, self).__init__()
            self._model, self.tokenizer = embedded
            self._max_tokens, self.use_chat_template = None, False

    def results(model):
        found = lm_eval.simple_evaluate(
            model,
            tasks=["tempo_colours"],
            num_fewshot=2,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        )
        samples = found["samples"]["tempo_colours"]
        logprobs = [float(answer[0]) for each in samples for answer in each["filtered_resps"]]
        return found["results"]["tempo_colours"]["acc,none"], np.array(logprobs)

    before = lm._reader.stats.tokens_computed
    accuracy, logprobs = results(lm)
    stock_accuracy, stock_logprobs = results(Stock())
    assert accuracy == stock_accuracy
    # mlx-lm adds up a softmax one by one on the CPU: off by 1e-4 a token.
    np.testing.assert_allclose(logprobs, stock_logprobs, atol=1e-3)
    assert lm._reader.stats.tokens_computed - before < lm._reader.stats.tokens_reused


@pytest.mark.slow
def test_the_command_writes_a_table_and_json(folder, run, tmp_path):
    output = tmp_path / "results.json"
    asked = ["evaluate", "--include-path", folder, "--num-fewshot", 1, "-o", output]
    code, told, errors = run(*asked, "--tasks", "tempo_colours")
    assert code == 0, errors
    found = json.loads(output.read_text())
    accuracy = found["results"]["tempo_colours"]["acc,none"]
    table, written = told.rstrip().rsplit("\n", 1)
    assert f"{accuracy:.4f}" in table and max(map(len, table.splitlines())) <= 80
    assert written == f"written: {output}"
    code, _, errors = run(*asked, "--tasks", "nonsense")
    assert code == 2 and "'nonsense' is not a task" in errors
