"""Stop strings: found across pieces, never shown, nor the start of one."""

import pytest
from library import open_library, text_of

from gpt2x import SHAKESPEARE
from gpt2x.generation.stop_strings import StopStrings, cut


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("strings", "text", "shown"),
    [
        (["END"], "a text END more", "a text "),
        (["END"], "a text E EN and no more", "a text E EN and no more"),
        (["aab"], "aaab", "a"),
        (["abab", "ba"], "xabab", "xa"),
        (["\n\n", "x"], "one\ntwo\n\nthree", "one\ntwo"),
        (["é"], "caf\u00e9", "caf"),
        ([], "all of it", "all of it"),
    ],
)
def test_a_text_is_cut_at_the_first_stop_string_however_it_arrives(strings, text, shown, size):
    stops = StopStrings(strings)
    pieces = [stops.push(text[start : start + size]) for start in range(0, len(text), size)]
    assert "".join(pieces) + stops.flush() == shown == cut(text, strings)


def test_what_may_become_a_stop_string_is_held_back():
    stops = StopStrings(["\n\nHuman:"])
    assert stops.push("yes\n") == "yes"
    assert stops.push("\nHum") == ""
    assert stops.push("ming") == "\n\nHumming"
    assert not stops.stopped


@pytest.mark.parametrize("strings", [[""], ["a", ""], "abc"])
def test_an_empty_stop_string_and_a_bare_string_are_errors(strings):
    with pytest.raises(ValueError, match="stop"):
        StopStrings(strings)


@pytest.fixture(scope="module")
def shakespeare():
    return open_library()


PROMPTS = ["ROMEO:", "What light"]


@pytest.fixture(scope="module")
def whole(shakespeare):
    return text_of(shakespeare, PROMPTS, 60, 0)


@pytest.mark.parametrize("stop", [[" thee"], ["l t", "rou"], ["\n\n"]], ids=str)
def test_streams_and_whole_texts_stop_before_the_string(shakespeare, whole, stop):
    prompts = PROMPTS
    stopped = text_of(shakespeare, prompts, 60, 0, stop_strings=stop)
    for prompt, text, expected in zip(prompts, stopped, whole, strict=True):
        assert text == prompt + cut(expected[len(prompt) :], stop)
    pieces = list(text_of(shakespeare, prompts, 60, 0, stop_strings=stop, stream=True))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == stopped
    assert stopped != whole


def test_transformers_stops_at_the_same_token(shakespeare):
    import torch
    from tokenizers import Tokenizer as Fast
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    from converters import open_checkpoint
    from gpt2x.generation.config import GenerationConfig as Ours
    from gpt2x.generation.generate import continuations
    from gpt2x.runtimes.torch import TorchDecoder
    from gpt2x.runtimes.transformers import Transformers

    model, tokenizer = shakespeare
    theirs = Transformers(open_checkpoint(SHAKESPEARE)).model
    fast = PreTrainedTokenizerFast(tokenizer_object=Fast.from_str(tokenizer._backend.to_str()))
    ids = torch.tensor([tokenizer.encode("ROMEO:")])
    for stop in ([" thee"], ["l t", "rou"], ["my lord", "?\n"]):
        config = GenerationConfig(max_new_tokens=60, do_sample=False, stop_strings=stop, pad_token_id=0)
        found = theirs.generate(ids, generation_config=config, tokenizer=fast)[0, ids.shape[1] :].tolist()
        ours = continuations(
            TorchDecoder(model), tokenizer, ["ROMEO:"], Ours.of(max_new_tokens=60, temperature=0, stop_strings=stop)
        )
        assert ours[0][0].tokens == found
