"""OpenAI's own Python client against the server. The engine behind it answers with the prompt, backwards."""

from __future__ import annotations

import contextlib
import json

import openai
import pytest

from tests.serve.server.live import until

HELLO = [{"role": "user", "content": "hello"}]
HELLO_BACKWARDS = "User: hello\nAssistant:"[::-1]  # without a template, a conversation reads so


def chat(served, **options):
    return served.client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "temperature": 0, **options})


def complete(served, **options):
    return served.client.completions.create(**{"model": "tiny", "prompt": "hello", "temperature": 0, **options})


def test_models(served):
    (card,) = served.client.models.list().data
    assert (card.id, card.object, card.max_model_len) == ("tiny", "model", 512)
    assert served.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        served.client.models.retrieve("another/model")


def test_a_completion(served):
    reply = complete(served, max_tokens=7)
    assert (reply.object, reply.model) == ("text_completion", "tiny")
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("ollehol", "length")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (5, 7, 12)
    assert reply.metrics["speculative_decoding"] == {
        "mean_acceptance_length": 2.0,
        "draft_acceptance_rate": 4 / 12,
        "num_spec_steps": 4,
        "num_draft_tokens": 12,
        "num_accepted_draft_tokens": 4,
    }
    assert len(complete(served).choices[0].text) == 16  # where no limit is given


def test_a_chat(served):
    reply = chat(served, max_completion_tokens=22)
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == HELLO_BACKWARDS
    assert chat(served).usage.total_tokens == 512  # without a limit, as much as there is room for
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    same = chat(served, messages=[{"role": "user", "content": parts}], max_tokens=22)
    assert same.choices[0].message.content == HELLO_BACKWARDS
    told = chat(served, messages=[{"role": "developer", "content": "be brief"}, *HELLO], max_tokens=43)
    assert told.choices[0].message.content == ("System: be brief\n" + HELLO_BACKWARDS[::-1])[::-1] + ":tna"


@pytest.mark.parametrize("count", [1, 2])
def test_a_stream_is_the_whole_in_pieces(served, count):
    whole = chat(served, max_tokens=11, n=count)
    options = {"include_usage": True}
    chunks = list(chat(served, max_tokens=11, n=count, stream=True, stream_options=options))
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in mine) == choice.message.content
        assert [part.finish_reason for part in mine] == [None] * (len(mine) - 1) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_the_events_of_a_stream(served):
    body = {"prompt": "hello", "max_tokens": 3, "temperature": 0, "stream": True}
    answer = served.http.post("/v1/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream"
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "oll"
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_ends_the_reply_before_it(served, stream):
    reply = complete(served, max_tokens=50, stop=["nothing", "eho"], stream=stream)
    choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
    assert "".join(choice.text for choice in choices) == "oll"
    assert choices[-1].finish_reason == "stop"


def test_seeds(served):
    one = complete(served, seed=7, temperature=1, max_tokens=8).choices[0].text
    assert complete(served, seed=7, temperature=1, max_tokens=8).choices[0].text == one
    several = complete(served, seed=7, temperature=1, max_tokens=8, n=3).choices
    assert [choice.index for choice in several] == [0, 1, 2]
    alone = [complete(served, seed=7 + i, temperature=1, max_tokens=8).choices[0].text for i in range(3)]
    assert [choice.text for choice in several] == alone
    assert len(set(alone)) == 3
    folded = complete(served, seed=7 + 2**32, temperature=1, max_tokens=8).choices[0].text
    assert folded == one
    for _ in range(2):
        complete(served, temperature=1)
    assert served.engine.handles[-1].request.sampling.seed != served.engine.handles[-2].request.sampling.seed


def test_what_the_engine_is_asked(served):
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5, "ignore_eos": True, "store": False}
    complete(served, temperature=0.5, top_p=0.9, seed=3, extra_body=extra)
    asked = served.engine.handles[-1].request
    got = asked.sampling
    assert (got.temperature, got.top_p, got.top_k, got.min_p) == (0.5, 0.9, 5, 0.1)
    assert (got.repetition_penalty, got.seed, got.coupled) == (1.5, 3, True)
    assert (asked.eos_ids, asked.learn) == ((), False)
    served.client.completions.create(model="tiny", prompt="x", seed=1, extra_body={"top_k": -1})
    asked = served.engine.handles[-1].request
    assert (asked.sampling.temperature, asked.sampling.top_k) == (1.0, 0)
    assert (asked.eos_ids, asked.learn) == (None, True)
    complete(served)
    assert served.engine.handles[-1].request.sampling is None


def test_several_prompts_and_token_ids(served):
    replies = complete(served, prompt=["ab", "xyz"], n=2, max_tokens=3)
    assert [choice.text for choice in replies.choices] == ["bab", "bab", "zyx", "zyx"]
    assert [choice.index for choice in replies.choices] == [0, 1, 2, 3]
    assert replies.usage.prompt_tokens == 5
    ids = served.http.post("/tokenize", json={"prompt": "ab"}).json()
    assert (ids["count"], ids["max_model_len"]) == (2, 512)
    assert served.http.post("/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": "ab"}
    assert complete(served, prompt=ids["tokens"], max_tokens=3).choices[0].text == "bab"
    assert complete(served, prompt=[ids["tokens"], ids["tokens"][:1]], max_tokens=2).choices[1].text == "aa"
    conversation = served.http.post("/tokenize", json={"messages": HELLO}).json()
    assert conversation["count"] == len(HELLO_BACKWARDS)


def test_log_probabilities(served):
    content = chat(served, max_tokens=3, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [entry.token for entry in content] == [":", "t", "n"]
    assert [entry.bytes for entry in content] == [[58], [116], [110]]
    assert {entry.logprob for entry in content} == {-0.5}
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("`", -1.5), ("a", -2.5)]
    assert chat(served, max_tokens=3, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    streamed = list(chat(served, max_tokens=3, logprobs=True, stream=True))
    pieces = [chunk.choices[0].logprobs for chunk in streamed]
    assert [entry.token for piece in pieces if piece for entry in piece.content] == [":", "t", "n"]
    for stream in (False, True):
        replies = complete(served, max_tokens=4, logprobs=1, stream=stream)
        parts = [c.choices[0].logprobs for c in replies] if stream else [replies.choices[0].logprobs]
        assert [token for part in parts for token in part.tokens] == ["o", "l", "l", "e"]
        assert [offset for part in parts for offset in part.text_offset] == [0, 1, 2, 3]
        assert parts[0].top_logprobs[0] == {"`": -1.5}


def test_a_client_whose_patience_ends(served):
    served.engine.pause()
    impatient = served.client.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(model="tiny", prompt="hello")
    served.idle()  # while the engine is paused: the request was taken back


@pytest.mark.parametrize("paused", [False, True])
def test_a_stream_that_is_left(served, paused):
    served.engine.pace = 0.02
    if paused:
        served.engine.pause()
    stream = complete(served, prompt="x" * 50, max_tokens=400, stream=True)
    if not paused:
        assert next(iter(stream)).choices[0].text == "xx"
    stream.close()
    served.idle()
    assert served.engine.handles[-1].statistics.new_tokens < 400


def test_a_stream_is_kept_alive_while_it_waits(served):
    served.engine.pause()
    body = {"prompt": "hello", "max_tokens": 1, "temperature": 0, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines) == ": "
        served.engine.go()
        assert [line for line in lines if line.startswith("data")][-1] == "data: [DONE]"


def test_a_full_queue(served):
    """Four slots, eight places in the queue: then 503, and what was refused leaves nothing behind."""
    served.engine.pause()
    with contextlib.ExitStack() as stack:
        for _ in range(7):
            stream = complete(served, stream=True)
            stack.callback(stream.close)
        with pytest.raises(openai.InternalServerError) as caught:
            complete(served, n=2)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "3"
        assert caught.value.code == "queue_full"
        until(lambda: len(served.engine.waiting) == 7)
        last = complete(served, stream=True)
        served.engine.go()
        assert "".join(chunk.choices[0].text for chunk in last) == ("olleh" * 4)[:16]


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails(byte_tokenizer, stream):
    from tests.serve.server.live import live_server
    from tests.serve.server.scripted import ScriptedEngine

    engine = ScriptedEngine(byte_tokenizer)
    engine.pace = 0.05
    with (
        live_server(engine, byte_tokenizer) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client,
    ):
        options = {"model": "tiny", "prompt": "hello", "max_tokens": 500, "temperature": 0}
        if stream:
            reply = iter(client.completions.create(**options, stream=True))
            assert next(reply).choices[0].text == "ol"
            engine.fail("the device is gone")
            with pytest.raises(openai.APIError, match="the device is gone"):
                list(reply)
        else:
            engine.fail("the device is gone")
        with pytest.raises(openai.InternalServerError, match="the device is gone") as caught:
            client.completions.create(**options)
        assert caught.value.status_code == 500
        assert live.serving.health() == "the engine failed: the device is gone"
