"""Data modules of a few texts, and what they hold."""

from lightning_ablate.data import TextData

SMALL = {"max_length": 16, "calibration_tokens": 100, "evaluation_tokens": 200}


def data(name, tokenizer, purpose="fit", **options):
    made = TextData(str(name), tokenizer=tokenizer, **({"batch_size": 4} | SMALL | options))
    made.setup(purpose)
    return made


def rows(made, purpose):
    examples = [made.examples[purpose][i] for i in range(len(made.examples[purpose]))]
    return [one["input_ids"][one["attention_mask"].bool()].tolist() for one in examples]


def data_of(given, tokenizer, **options):
    made = TextData.of(given, tokenizer=tokenizer, **(SMALL | options))
    made.setup("fit")
    return made
