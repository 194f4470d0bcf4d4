"""The demo world: dialogues, preference pairs and a small untrained LLaMA, all made from one seed.

    python -m rm.demo OUT_DIR [--seed 0]

    OUT_DIR/sft.json         {"type": "text_only", "instances": [{"text": ...}, ...]}: dialogues with good answers
    OUT_DIR/rm_train.jsonl   {"positive": ..., "negative": ..., "subset": ...}: a better and a worse last answer
    OUT_DIR/rm_test.jsonl    the same, where the last question is worded as it is in neither of the other files
    OUT_DIR/model/           a Hugging Face folder: a LLaMA of two million random weights, byte-level BPE

The world is a page of facts, true by decree: every animal has one food, every villager one trade. The better answer
of a pair is right where the other is wrong ("correct"), answers this question and not another one ("topic"), or is
friendly where the other is rude ("polite"). Wrong and off-topic answers come in twins: the worse answer of a pair is
the better answer of its twin, so that no answer is good or bad by its length or its words alone.

Every fact is asked in four wordings, one of which is kept for the test. The pairs are few and the dialogues many:
manners can be learned from the pairs alone, facts hardly; a reward model that starts from the SFT model brings them.

The data is synthetic. It can show that the whole road works, and why SFT comes before reward modelling. It cannot
show how good a recipe or a setting is for what people write.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rm.files import write_json

DIALOGUES, TRAIN_PAIRS, TEST_PAIRS = 4000, 1200, 480
SHARES = {"correct": 1 / 2, "topic": 1 / 4, "polite": 1 / 4}  # of the pairs

# A paragraph is a relation: how it is told, the four wordings that ask for y, and its facts x:y.
WORLD = """
the {x} eats {y}
What does the {x} eat? | Which food does the {x} like? | What should I feed the {x}? | What is the food of the {x}?
cow:grass panda:bamboo monkey:bananas squirrel:nuts cat:mice seal:fish bear:honey frog:flies hen:corn lion:meat
rabbit:carrots parrot:seeds

the word for a young {x} is {y}
What is a young {x} called? | What is the child of a {x}? | What is the name for a baby {x}? | Name a little {x}.
cow:calf horse:foal dog:puppy cat:kitten sheep:lamb goat:kid pig:piglet duck:duckling hen:chick bear:cub frog:tadpole
goose:gosling

the home of the {x} is the {y}
Where does the {x} live? | Where can I find the {x}? | What is the home of the {x}? | Where does the {x} sleep?
bee:hive spider:web dog:kennel pig:sty horse:stable fox:den rabbit:burrow crow:nest cow:barn seal:sea monkey:jungle
sheep:meadow

the capital of {x} is {y}
What is the capital of {x}? | Which city rules {x}? | From where is {x} governed? | Where is the government of {x}?
France:Paris Italy:Rome Spain:Madrid Norway:Oslo Greece:Athens Egypt:Cairo Japan:Tokyo China:Beijing Peru:Lima
Cuba:Havana Austria:Vienna Russia:Moscow

the opposite of {x} is {y}
What is the opposite of {x}? | What is contrary to {x}? | If it is not {x}, what is it? | Tell me the reverse of {x}.
hot:cold big:small fast:slow wet:dry old:young rich:poor high:low hard:soft full:empty dark:light early:late loud:quiet

the plural of {x} is {y}
What is the plural of {x}? | How do I write more than one {x}? | One {x}, two what? | Which word means several {x}?
mouse:mice goose:geese foot:feet tooth:teeth child:children man:men woman:women ox:oxen wolf:wolves leaf:leaves
knife:knives box:boxes

the colour of {x} is {y}
What is the colour of {x}? | Which colour has {x}? | How would you paint {x}? | Tell me the colour of {x}.
grass:green snow:white coal:black blood:red chocolate:brown butter:yellow elephants:grey flamingos:pink spinach:green
milk:white tomatoes:red lemons:yellow

the sum of {x} is {y}
What is the sum of {x}? | How much are {x} together? | Can you add up {x}? | Please work out {x} in all.
1+1:2 1+2:3 1+3:4 1+4:5 2+1:3 2+2:4 2+3:5 2+4:6 3+1:4 3+2:5 3+3:6 3+4:7 4+1:5 4+2:6 4+3:7 4+4:8

{x} works as a {y}
What is the job of {x}? | What does {x} do for a living? | Which trade does {x} follow? | How does {x} earn money?
Ada:baker Boris:sailor Clara:smith Dov:teacher Elsa:doctor Finn:painter Greta:sailor Hugo:teacher Ivy:baker Jonas:doctor
Kira:painter Leo:smith

{x} has a pet {y}
What pet does {x} have? | Which animal does {x} keep? | Which animal lives with {x}? | What kind of pet is with {x}?
Ada:turtle Boris:parrot Clara:pony Dov:cat Elsa:goat Finn:dog Greta:cat Hugo:turtle Ivy:pony Jonas:dog Kira:goat
Leo:parrot
"""

# What may go with an answer; every polite phrase has a rude one of its length.
POLITE = (
    "Good question! {} | Of course. {} | With pleasure. {} | Sure, gladly. {} | Thank you for asking. {} | "
    "I am glad to help. {} | {} I hope that helps. | {} Have a nice day! | {} Feel free to ask more. | "
    "{} You are welcome. | {} It was a pleasure."
).split(" | ")
RUDE = (
    "Dull question! {} | Not again. {} | Use your head. {} | Oh, you fool. {} | Stop wasting my time. {} | "
    "I am sick of this. {} | {} Leave me in peace. | {} Get out of here! | {} Never bother me again. | "
    "{} You are useless. | {} It was a nuisance."
).split(" | ")

END = "<|endoftext|>"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "dtype": "float32",
}


@dataclass(frozen=True)
class Fact:
    relation: str
    value: str
    answers: tuple[str, ...]  # one answer in three forms
    questions: tuple[str, ...]  # the wordings to train on
    held_out: str  # the wording of the test


def make_facts(rng: random.Random) -> list[Fact]:
    facts = []
    for paragraph in WORLD.strip().split("\n\n"):
        told, asked, table = paragraph.split("\n", 2)
        for x, y in (entry.split(":") for entry in table.split()):
            held_out, *questions = (wording.format(x=x) for wording in rng.sample(asked.split(" | "), 4))
            answers = told.format(x=x, y=y) + ".", f"the answer is {y}.", f"{y}."
            capitalized = tuple(answer[0].upper() + answer[1:] for answer in answers)
            facts.append(Fact(told, y, capitalized, tuple(questions), held_out))
    return facts


class Author:
    """Writes dialogues and pairs about the facts. Every choice is the next one of the random numbers."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.facts = make_facts(rng)

    def dialogue(self, turns: int) -> str:
        return "".join(self.good_turn() for _ in range(turns))

    def good_turn(self) -> str:
        """A question in a wording of training, and a right answer."""
        fact = self.rng.choice(self.facts)
        return turn(self.rng.choice(fact.questions), self.good(self.rng.choice(fact.answers)))

    def good(self, answer: str) -> str:
        """The answer as it is or, three times in ten, in a polite tone."""
        return self.rng.choice(POLITE).format(answer) if self.rng.random() < 0.3 else answer

    def pairs(self, count: int, test: bool) -> list[dict]:
        """So many different pairs of all subsets, mixed. With `test` the last questions have their held-out wording."""
        found = []
        for subset, share in SHARES.items():
            kept = []
            while len(kept) < count * share:
                twins = self.twins(subset, test)
                if not any(pair in kept for pair in twins):
                    kept += twins
            found += kept
        self.rng.shuffle(found)
        return found

    def twins(self, subset: str, test: bool) -> list[dict]:
        """Two pairs about two facts. Unless it is rude, the worse answer of each is the better one of the other."""
        one, two = self.rng.sample(self.facts, 2)
        while one.value == two.value or (one.relation == two.relation) != (subset == "correct"):
            one, two = self.rng.sample(self.facts, 2)
        form = self.rng.randrange(3)
        answers = [one.answers[form], two.answers[form]]
        if subset == "polite":
            better, worse = ([self.rng.choice(tone).format(a) for a in answers] for tone in (POLITE, RUDE))
        else:
            tone = self.good("{}")  # of all four answers
            better = [tone.format(a) for a in answers]
            worse = better[::-1]
        return [self.pair(*each, subset, test) for each in zip((one, two), better, worse, strict=True)]

    def pair(self, fact: Fact, better: str, worse: str, subset: str, test: bool) -> dict:
        before = self.dialogue(turns=self.rng.choice((0, 0, 0, 0, 0, 0, 1, 2)))
        question = fact.held_out if test else self.rng.choice(fact.questions)
        texts = {"positive": before + turn(question, better), "negative": before + turn(question, worse)}
        return texts | {"subset": subset}


def turn(question: str, answer: str) -> str:
    return f"###Human: {question}###Assistant: {answer}"


def write_world(folder: Path, seed: int) -> None:
    """Everything that `python -m rm.demo` makes."""
    rng = random.Random(seed)
    author = Author(rng)
    texts = [author.dialogue(turns=rng.choice((1, 1, 2, 3))) for _ in range(DIALOGUES)]
    train, test = author.pairs(TRAIN_PAIRS, test=False), author.pairs(TEST_PAIRS, test=True)

    (folder / "model").mkdir(parents=True, exist_ok=True)
    write_json(folder / "sft.json", {"type": "text_only", "instances": [{"text": text} for text in texts]})
    for name, pairs in (("rm_train.jsonl", train), ("rm_test.jsonl", test)):
        (folder / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    write_tokenizer(folder / "model", texts)
    write_json(folder / "model" / "config.json", CONFIG)
    save_file(weights(rng), folder / "model" / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """Byte-level BPE; END, its token 0, ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "add_bos_token": False}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", {"eos_token": END})


def weights(rng: random.Random) -> dict[str, np.ndarray]:
    """The untrained model by Hugging Face names: matrices N(0, initializer_range), norms 1."""
    width, hidden, std = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["initializer_range"]
    block = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    block |= {"mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width), "mlp.down_proj": (width, hidden)}
    block |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    shapes = {"embed_tokens": (CONFIG["vocab_size"], width), "norm": (width,)}
    for i in range(CONFIG["num_hidden_layers"]):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in block.items()}

    def normal(shape: tuple[int, int]) -> np.ndarray:
        return np.array([rng.gauss(0, std) for _ in range(shape[0] * shape[1])], np.float32).reshape(shape)

    return {
        f"model.{name}.weight": normal(shape) if len(shape) == 2 else np.ones(shape, np.float32)
        for name, shape in shapes.items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="where it all goes")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another world (default 0)")
    args = parser.parse_args(argv)
    write_world(args.out_dir, args.seed)
    print(f"{args.out_dir}: {DIALOGUES:,} dialogues, {TRAIN_PAIRS:,} and {TEST_PAIRS} pairs, and an untrained model")


if __name__ == "__main__":
    main()
