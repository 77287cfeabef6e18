"""Prompts with sets: their markup, and their tokens with tokenizers of several kinds."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_ext import demo
from hf_ext.generation.structured.set_prompt import SetPrompt, encode
from hf_ext.testing import tiny_models
from hf_ext.testing.strategy_base import refusal

TEXT = (
    "Is 2 the cat sat on a mat (the dog did not) and the bird flew = over the cat. A cat is an animal? yes: the cat\n"
    * 4
)
PROMPT = SetPrompt("Is the cat (", ["the dog", "a bird = 2", " the mat"], ") an animal?\n", ["yes", "no"], " the end.")


def metaspace(scheme):
    """A tokenizer as sentencepiece makes them: a space before the text, spaces kept as a letter, bos in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if scheme == "normalizer":  # as converted Llama tokenizers do it
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme)
    tokenizer.train_from_iterator(
        TEXT.splitlines(keepends=True), trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], vocab_size=140)
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def byte_level(prefix_space):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.train_from_iterator(
        TEXT.splitlines(keepends=True),
        trainers.BpeTrainer(vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    made.pad_token_id = 0
    return made


TOKENIZERS = {
    "embedded": lambda: AutoTokenizer.from_pretrained(demo.path("tokenizer")),
    "byte level": lambda: byte_level(False),
    "byte level, space first": lambda: byte_level(True),
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace by normalizer": lambda: metaspace("normalizer"),
}


def parts_of(inputs, row=0):
    """Return the tokens of every piece of a row, padding and front aside."""
    real = inputs["attention_mask"][row].bool()
    pieces = []
    for token, segment in zip(
        *(inputs[name][row][real].tolist() for name in ("input_ids", "segment_ids")), strict=True
    ):
        if not pieces or pieces[-1][0] != segment:
            pieces.append((segment, []))
        pieces[-1][1].append(token)
    return [tokens for _, tokens in pieces]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_keep_their_borders_and_their_text(kind):
    tokenizer = TOKENIZERS[kind]()
    inputs = PROMPT.encode(tokenizer)
    pieces = parts_of(inputs)
    expected = ["Is the cat (", "the dog", "a bird = 2", " the mat", ") an animal?\n", "yes", "no", " the end."]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in pieces]
    # A space that the tokenizer puts before every text stands before the prompt, and before no other piece.
    adds = "metaspace" in kind or "space first" in kind
    assert texts == [" " * adds + expected[0], *expected[1:]], texts
    assert inputs["segment_ids"].unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert inputs["group_ids"].unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_option_has_the_same_tokens_in_every_order(kind):
    tokenizer = TOKENIZERS[kind]()
    for prompt in (PROMPT, SetPrompt(["the cat", "a dog", " the mat"], " is an animal")):
        first = parts_of(prompt.encode(tokenizer))
        start = 1 if isinstance(prompt.parts[0], str) or "metaspace" in kind else 0
        other = parts_of(prompt.reordered([2, 0, 1]).encode(tokenizer))
        assert [other[start], other[start + 1], other[start + 2]] == [first[start + 2], first[start], first[start + 1]]
        assert other[start + 3 :] == first[start + 3 :]


@pytest.mark.parametrize("kind", ["metaspace, always", "metaspace, first", "metaspace by normalizer"])
def test_special_tokens_stand_at_the_front_only(kind):
    tokenizer = TOKENIZERS[kind]()
    ids = PROMPT.encode(tokenizer)["input_ids"][0].tolist()
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.eos_token_id not in ids


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_without_sets_is_tokenised_as_always(kind):
    tokenizer = TOKENIZERS[kind]()
    ids = SetPrompt("Is the cat an animal?").encode(tokenizer)["input_ids"][0].tolist()
    plain = tokenizer("Is the cat an animal?")["input_ids"]
    assert ids == [token for token in plain if token != tokenizer.eos_token_id], (ids, plain)


def test_a_batch_is_padded_on_the_left_whatever_the_tokenizer_says():
    tokenizer = tiny_models.tokenizer()
    tokenizer.padding_side = "right"
    inputs = encode(tokenizer, ["ab<set><option>c</option></set>d", SetPrompt("x")])
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    assert inputs["segment_ids"].tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]
    assert inputs["input_ids"][1, :3].tolist() == [tokenizer.pad_token_id] * 3
    assert inputs.to("cpu")["group_ids"].tolist()[0] == [0, 0, 1, 0]


def test_markup_and_parts_say_the_same():
    markup = "Is <set><option>a cat</option> <option>a dog</option>\n</set> an <set><option>x</option></set>"
    prompt = SetPrompt.parse(markup)
    assert prompt == SetPrompt("Is ", ["a cat", "a dog"], " an ", ["x"])
    assert SetPrompt.parse(prompt.markup) == prompt
    assert prompt.text == "Is a cata dog an x"
    assert SetPrompt("a", "b", ["c"]) == SetPrompt("ab", ["c"]), "texts side by side are one piece"


@pytest.mark.parametrize(
    "parts",
    [
        ("a <set> b", ["</option>", "\\"], "\\<set>"),
        ("\\", ["x\\"], "\\"),
        (["<option>", "\\\\<set>\\"], "\\\\"),
        ("<p> x < 3 </p>", ["<a>"]),
    ],
)
def test_text_that_looks_like_markup_survives(parts):
    prompt = SetPrompt(*parts)
    assert SetPrompt.parse(prompt.markup) == prompt, prompt.markup


@pytest.mark.parametrize(
    ("markup", "words"),
    [
        ("a <set><option>x <set><option>y</option></set></option></set>", "do not nest"),
        ("a <set><set><option>y</option></set></set>", "do not nest"),
        ("a <set></set> b", "at least one option"),
        ("a <set><option></option></set>", "option is empty"),
        ("a <set><option>x</option> b", "never closed"),
        ("a <set><option>x", "this option is never closed"),
        ("a <set><option>x</set>", "option before it is not closed"),
        ("a <set><option>x<option>y</option></set>", "option before it is not closed"),
        ("a <set>loose<option>x</option></set>", "'loose' stands between"),
        ("a <set><option>x</option>loose</set>", "'loose' stands between"),
        ("a <option>x</option>", "outside of a set"),
        ("a </set>", "outside of a set"),
        ("a <set></option></set>", "no option is open"),
    ],
)
def test_wrong_markup_is_refused_with_its_place(markup, words):
    message = refusal(lambda: SetPrompt.parse(markup), words, what=markup)
    assert message.startswith("character "), message


def test_wrong_parts_are_refused():
    refusal(lambda: SetPrompt(), "needs parts", what="nothing")
    refusal(lambda: SetPrompt("a", [], "b"), "at least one option", what="an empty set")
    refusal(lambda: SetPrompt("a", ["x", ""], "b"), "option is empty", what="an empty option")
    refusal(lambda: SetPrompt("a", ["x", ["y", "z"]], "b"), "do not nest", what="a set in a set")
    refusal(lambda: SetPrompt("a", ["x", SetPrompt("y")], "b"), "do not nest", what="a prompt in a set")
    refusal(lambda: SetPrompt("a", ["x", 3], "b"), "must be a str", what="a number")
    refusal(lambda: SetPrompt("a", ["x", "y"]).reordered([0, 0]), "every number", what="a wrong order")
    refusal(lambda: SetPrompt("a", ["x", "y"]).reordered([1, 0], which=1), "1 sets", what="a set that is not there")
    refusal(lambda: SetPrompt("a", 5), "text or a list", what="a number for a part")
    refusal(lambda: SetPrompt.parse([5, 6]), "str with markup", what="ids for markup")
    refusal(lambda: encode(None, "a"), "tokenizer of transformers, got None", what="no tokenizer")
    tokenizer = tiny_models.tokenizer()
    refusal(lambda: encode(tokenizer, [""]), "prompt 0 is empty", what="an empty prompt")
    refusal(lambda: encode(tokenizer, []), "no prompts", what="no prompts")
    tokenizer.pad_token = tokenizer.eos_token = None
    assert encode(tokenizer, "a")["input_ids"].shape == (1, 1)
    refusal(lambda: encode(tokenizer, ["a", "bc"]), "pad_token", what="no padding token")


def test_conversations_go_through_the_chat_template():
    tokenizer = metaspace("first")
    tokenizer.chat_template = (
        "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}yes: {% endif %}"
    )
    messages = [{"role": "a", "content": "Is <set><option>the cat</option><option>a dog</option></set> ?"}]
    prompt = SetPrompt.from_messages(tokenizer, messages)
    assert prompt.parts == ("<s>a: Is ", ("the cat", "a dog"), " ?\nyes: ")
    ids = prompt.reordered([1, 0]).encode(tokenizer)["input_ids"][0].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1, "the template's bos and the tokenizer's"
    assert ids[0] == tokenizer.bos_token_id
    assert SetPrompt.from_messages(tokenizer, messages, add_generation_prompt=False).parts[-1] == " ?\n"
