"""Where tokenizers put their special tokens."""

import pytest

from lightning_ablate.data.text import special_frame
from lightning_ablate.errors import DataError
from tests import tiny


def wordlevel(words, template=None, normalizer=None):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<none>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        special = [(word, words.index(word)) for word in ("<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    if normalizer:
        made.normalizer = normalizers.Replace(normalizer, "")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="</s>", eos_token="</s>", model_max_length=64)


WORDS = ["<s>", "</s>", "b", "c", "a"]


def python_tokenizer(kind):
    import transformers

    return getattr(transformers, kind)()


FRAMES = {
    "gpt2": (lambda: tiny.tokenizer(), ([], [])),
    "roberta": (lambda: tiny.tokenizer(masked=True), ([0], [2])),
    "template": (lambda: wordlevel(WORDS, "<s> $A </s> </s>"), ([0], [1, 1])),
    "bos alone": (lambda: wordlevel(WORDS, "<s> <s> $A"), ([0, 0], [])),
    "no a": (lambda: wordlevel(WORDS[:4], "<s> $A </s>"), ([0], [1])),
    "a is stripped": (lambda: wordlevel(WORDS, "<s> $A </s>", "a"), ([0], [1])),
    "a is a special token": (lambda: wordlevel(["a", "</s>", "<s>", "b", "c"], "</s> <s> $A </s>"), ([1, 2], [1])),
    "t5": (lambda: python_tokenizer("T5Tokenizer"), ([], [1])),
    "llama": (lambda: python_tokenizer("LlamaTokenizer"), ([], [])),
    "byt5, in Python": (lambda: python_tokenizer("ByT5Tokenizer"), ([], [1])),
    "canine, in Python": (lambda: python_tokenizer("CanineTokenizer"), ([57344], [57345])),
}


@pytest.mark.parametrize("name", FRAMES)
def test_special_tokens_stand_where_the_tokenizer_puts_them(name):
    make, expected = FRAMES[name]
    tokenizer = make()
    assert special_frame(tokenizer) == expected
    before, after = expected
    for text in ("b c b", "c"):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer(text)["input_ids"] == [*before, *plain, *after]


def test_a_tokenizer_that_does_otherwise_than_it_says_is_refused():
    class Other(type(wordlevel(WORDS))):
        def __call__(self, text, **options):
            found = super().__call__(text, **options)
            found["input_ids"] = [3, *found["input_ids"]] if options.get("add_special_tokens", True) else [4]
            return found

    other = Other(tokenizer_object=wordlevel(WORDS).backend_tokenizer)
    for tokenizer in (other, wordlevel(WORDS, "<s> $A </s> $A")):
        with pytest.raises(DataError, match=r"bring another \(--data.tokenizer\)"):
            special_frame(tokenizer)
