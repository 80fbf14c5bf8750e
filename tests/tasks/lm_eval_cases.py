"""Tasks of lm-eval with rows of their data sets' columns, and by hand what a model must be shown of the first one."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.tasks.lm_eval_free_cases import FREE
from tests.tasks.lm_eval_rows import (
    ARC,
    ARC_LETTERS,
    ARC_NATIVE,
    ARC_TRAIN,
    TRUTHFUL,
    Case,
    agieval,
    anli,
    boolq,
    copa,
    csqa,
    hellaswag,
    logiqa,
    mathqa,
    mc1,
    mmlu,
    openbook,
    piqa,
    race,
    sciq,
    siqa,
    winogrande,
)

CASES = {
    "arc_easy": Case(
        path="arc/arc_easy.yaml",
        splits={"test": ARC, "train": ARC_TRAIN, "validation": ARC_TRAIN},
        native=ARC_NATIVE,
        generated=ARC_LETTERS,
        choices=("leaf", "root", "petal", "seed"),
        gold=1,
    ),
    "arc_challenge": Case(
        path="arc/arc_challenge.yaml",
        splits={"test": ARC[::-1], "train": ARC_TRAIN, "validation": ARC_TRAIN},
        native="Question: What do lungs take in?\nAnswer:",
        generated="Question: What do lungs take in?\nA. sand\nB. light\nC. air\nAnswer:",
        choices=("sand", "light", "air"),
        gold=2,
    ),
    "boolq": Case(
        path="super_glue/boolq/default.yaml",
        splits={
            "validation": [
                boolq("The tower closes at six.", "is the tower open at night", 0),
                boolq("A fee is asked at the gate.", "is a fee asked at the gate", 1),
            ],
            "train": [
                boolq("Water is wet.", "is water wet", 1),
                boolq("Dogs bark.", "do cats bark", 0),
                boolq("It was cold.", "was it hot", 0),
            ],
        },
        native="The tower closes at six.\nQuestion: is the tower open at night?\nAnswer:",
        generated="The tower closes at six.\nQuestion: is the tower open at night?\nA. no\nB. yes\nAnswer:",
        choices=("no", "yes"),
        gold=0,
    ),
    "piqa": Case(
        path="piqa/piqa.yaml",
        splits={
            "validation": [
                piqa("To keep milk fresh,", "keep it cold.", "keep it in the sun.", 0),
                piqa("To open a door,", "push the wall.", "turn the key.", 1),
            ],
            "train": [
                piqa("To dry hair,", "use a towel.", "use a spoon.", 0),
                piqa("To boil an egg,", "use ice.", "use hot water.", 1),
                piqa("To see at night,", "use a lamp.", "use a rope.", 0),
            ],
        },
        native="Question: To keep milk fresh,\nAnswer:",
        generated="Question: To keep milk fresh,\nA. keep it cold.\nB. keep it in the sun.\nAnswer:",
        choices=("keep it cold.", "keep it in the sun."),
        gold=0,
    ),
    "hellaswag": Case(
        path="hellaswag/hellaswag.yaml",
        splits={
            "validation": [
                hellaswag("Baking", "A cook mixes flour.", "she", ["adds milk.", "flies.", "sings [title] out."], "0"),
                hellaswag("Running", "A dog runs.", "it", ["reads.", "barks at the cat.", "melts."], "1"),
            ],
            "train": [
                hellaswag("Rowing", "A man sits in a boat.", "he", ["rows.", "falls up.", "is blue."], "0"),
                hellaswag("Rain", "It rains.", "they", ["burn.", "open umbrellas.", "are cups."], "1"),
                hellaswag("Chess", "Two play chess.", "one", ["swims.", "is rain.", "moves a pawn."], "2"),
            ],
        },
        native="Baking: A cook mixes flour. She",
        generated="Baking: A cook mixes flour. She\nA. adds milk.\nB. flies.\nC. sings. out.\nAnswer:",
        choices=("adds milk.", "flies.", "sings. out."),
        gold=0,
    ),
    "winogrande": Case(
        path="winogrande/default.yaml",
        splits={
            "validation": [
                winogrande("The cup did not fit in the bag because the _ was too big.", "cup", "bag", "1"),
                winogrande("Ann thanked Eve because _ had helped.", "Ann", "Eve", "2"),
            ],
            "train": [
                winogrande("The dog chased the cat because the _ was angry.", "dog", "cat", "1"),
                winogrande("Tom paid Jim since _ had won.", "Tom", "Jim", "2"),
                winogrande("The ice beat the fire as the _ was weak.", "ice", "fire", "2"),
            ],
        },
        native="",
        generated="The cup did not fit in the bag because the _ was too big.\nA. cup\nB. bag\nAnswer:",
        choices=("cup", "bag"),
        gold=0,
    ),
    "copa": Case(
        path="super_glue/copa/default.yaml",
        splits={
            "validation": [
                copa("The man broke his toe.", "He got a hole in his sock.", "He dropped a hammer.", "cause", 1),
                copa("It rained.", "The street was wet.", "The sun was out.", "effect", 0),
            ],
            "train": [
                copa("She was tired.", "She slept.", "She ran.", "effect", 0),
                copa("The ice melted.", "It froze.", "It was warm.", "cause", 1),
                copa("He ate.", "He was hungry.", "He was late.", "cause", 0),
            ],
        },
        native="The man broke his toe because",
        generated="The man broke his toe because\nA. he got a hole in his sock.\nB. he dropped a hammer.\nAnswer:",
        choices=(" he got a hole in his sock.", " he dropped a hammer."),
        gold=1,
    ),
    "sciq": Case(
        path="sciq/sciq.yaml",
        splits={
            "test": [
                sciq(" Plants need light.", "What do plants need?", "light", "sand", "salt", "iron"),
                sciq("", "What is frozen water?", "ice", "glass", "salt", "steam"),
            ],
            "train": [
                sciq("Dogs bark.", "What do dogs do?", "bark", "sing", "fly", "read"),
                sciq("", "What shines by day?", "the sun", "the moon", "a cup", "a rope"),
                sciq("Bees make honey.", "What do bees make?", "honey", "milk", "bread", "cars"),
            ],
            "validation": [],
        },
        native="Plants need light.\nQuestion: What do plants need?\nAnswer:",
        # The right one is always lm-eval's last, so the options stand in an order by hash.
        generated="Plants need light.\nQuestion: What do plants need?\n{options}\nAnswer:",
        choices=("sand", "salt", "iron", "light"),
        gold=3,
    ),
    "logiqa": Case(
        path="logiqa/logiqa.yaml",
        splits={
            "test": [
                logiqa(
                    "All dogs bark.", "What follows?", ["Rex barks.", "Cats bark.", "No dog barks.", "Fish fly."], "a"
                ),
                logiqa("It is cold.", "What is true?", ["It is hot.", "It is cold.", "It is May.", "It is dry."], "b"),
            ],
            "train": [
                logiqa("Ann is tall.", "Who is tall?", ["Bob", "Eve", "Ann", "Jim"], "c"),
                logiqa("Red is a colour.", "What is red?", ["a dog", "a colour", "a cup", "a word"], "b"),
                logiqa("Two is even.", "What is even?", ["one", "three", "five", "two"], "d"),
            ],
            "validation": [],
        },
        native="Passage: All dogs bark.\nQuestion: What follows?\nChoices:\nA. Rex barks.\nB. Cats bark.\n"
        "C. No dog barks.\nD. Fish fly.\nAnswer:",
        choices=("Rex barks.", "Cats bark.", "No dog barks.", "Fish fly."),
        gold=0,
        view="native",
    ),
    "mmlu_anatomy": Case(
        path="mmlu/default/mmlu_anatomy.yaml",
        splits={
            "test": [
                mmlu("Which one pumps blood? ", ["lung", "heart", "skin", "ear"], 1),
                mmlu("How many lungs\nare there?", ["1", "2", "3", "none, or A. B."], 1),
            ],
            "dev": [
                mmlu("Which one hears?", ["ear", "eye", "leg", "arm"], 0),
                mmlu("Which one sees?", ["ear", "nose", "eye", "arm"], 2),
                mmlu("Which one smells?", ["ear", "nose", "eye", "arm"], 1),
            ],
        },
        native="The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Which one pumps blood?\nA. lung\nB. heart\nC. skin\nD. ear\nAnswer:",
        choices=("lung", "heart", "skin", "ear"),
        gold=1,
        view="native",
    ),
    "truthfulqa_mc1": Case(
        path="truthfulqa/truthfulqa_mc1.yaml",
        splits={
            "validation": [
                mc1("What happens if you eat seeds?", "Nothing happens", "You grow a tree", "You turn green"),
                mc1("Is the earth flat?", "No", "Yes"),
            ]
        },
        native=f"{TRUTHFUL}A:",
        generated=f"{TRUTHFUL}{{options}}\nAnswer:",
        choices=("Nothing happens", "You grow a tree", "You turn green"),
        gold=0,
        shots=False,
    ),
    "mathqa": Case(
        path="mathqa/mathqa.yaml",
        splits={
            "test": [
                mathqa("What is 6 times 7?", "a ) 41 , b ) 42 , c ) 43 , d ) 44 , e ) none of these", "b"),
                mathqa("What is 2 plus 2?", "a ) 3 , b ) 5 , c ) 4 , d ) 6 , e ) 8", "c"),
            ],
            "train": [
                mathqa("What is 1 plus 1?", "a ) 2 , b ) 3 , c ) 4 , d ) 5 , e ) 6", "a"),
                mathqa("What is 9 minus 1?", "a ) 7 , b ) 6 , c ) 9 , d ) 8 , e ) 10", "d"),
                mathqa("What is half of 8?", "a ) 1 , b ) 4 , c ) 2 , d ) 8 , e ) 16", "b"),
            ],
            "validation": [],
        },
        native="Question: What is 6 times 7?\nAnswer:",
        generated="Question: What is 6 times 7?\nA. 41\nB. 42\nC. 43\nD. 44\nE. none of these\nAnswer:",
        choices=("41", "42", "43", "44", "none of these"),
        gold=1,
    ),
    "race": Case(
        path="race/race.yaml",
        splits={
            "test": [
                race("I met a cat.", "What did he meet?", ["a cat", "a dog", "a king", "a cook"], "A"),
                race("I saw rain.", "He saw  _  .", ["sun", "rain", "ice", "fog"], "B"),
                race("I ate bread.", "What did he eat?", ["ice", "sand", "bread", "salt"], "C"),
            ],
        },
        native="Article: I met a cat.\n\nQuestion: Who tells this?\nAnswer: a boy\nWhat did he meet?",
        generated="Article: I met a cat.\n\nQuestion: Who tells this?\nAnswer: a boy\nWhat did he meet?\n"
        "A. a cat\nB. a dog\nC. a king\nD. a cook\nAnswer:",
        choices=("a cat", "a dog", "a king", "a cook"),
        gold=0,
    ),
    "social_iqa": Case(
        path="siqa/siqa.yaml",
        splits={
            "validation": [
                siqa("Ann fell.", "How does Ann feel?", ("glad", "hurt", "proud"), "2"),
                siqa("Bob won.", "What will Bob do?", ("cheer", "cry", "sleep"), "1"),
            ],
            "train": [
                siqa("Eve sang.", "Why?", ("for fun", "to sleep", "by law"), "1"),
                siqa("Jim lost.", "How does Jim feel?", ("glad", "rich", "sad"), "3"),
                siqa("Tom ate.", "Why?", ("by law", "he was hungry", "to sleep"), "2"),
            ],
        },
        native="Q: Ann fell. How does Ann feel?\nA:",
        generated="Q: Ann fell. How does Ann feel?\nA. glad\nB. hurt\nC. proud\nAnswer:",
        choices=("glad", "hurt", "proud"),
        gold=1,
    ),
    "blimp_adjunct_island": Case(
        path="blimp/adjunct_island.yaml",
        splits={
            "train": [
                {"sentence_good": "Who did Ann see?", "sentence_bad": "Who did Ann leave after seeing?"},
                {"sentence_good": "What did Bob eat?", "sentence_bad": "What did Bob sleep after eating?"},
            ]
        },
        native="",
        generated="{options}\nAnswer:",
        choices=("Who did Ann see?", "Who did Ann leave after seeing?"),
        gold=0,
        shots=False,
    ),
    "xcopa_et": Case(
        path="xcopa/default_et.yaml",
        splits={
            "test": [
                copa("Ta kukkus.", "Jää oli libe.", "Päike paistis.", "cause", 0),
                copa("Sadas.", "Tänav kuivas.", "Tänav sai märjaks.", "effect", 1),
            ],
            "validation": [
                copa("Ta jooksis.", "Ta väsis.", "Ta magas.", "effect", 0),
                copa("Jää sulas.", "Oli külm.", "Oli soe.", "cause", 1),
                copa("Ta naeris.", "Nali oli hea.", "Oli pime.", "cause", 0),
            ],
        },
        native="Ta kukkus sest",
        generated="Ta kukkus sest\nA. jää oli libe.\nB. päike paistis.\nAnswer:",
        choices=("jää oli libe.", "päike paistis."),
        gold=0,
    ),
    "openbookqa": Case(
        path="openbookqa/openbookqa.yaml",
        splits={
            "test": [
                openbook("To see in a dark cave, one can use", ("a torch", "a rope", "a map", "a spoon"), "A"),
                openbook("Ice that is warmed will", ("rust", "melt", "burn", "sing"), "B"),
            ],
            "train": [
                openbook("Birds have", ("wheels", "wings", "keys", "roots"), "B"),
                openbook("Fire is", ("hot", "wet", "old", "blue"), "A"),
                openbook("Rain falls from", ("trees", "cars", "clouds", "cups"), "C"),
            ],
            "validation": [],
        },
        native="To see in a dark cave, one can use",
        generated="To see in a dark cave, one can use\nA. a torch\nB. a rope\nC. a map\nD. a spoon\nAnswer:",
        choices=("a torch", "a rope", "a map", "a spoon"),
        gold=0,
    ),
    "commonsense_qa": Case(
        path="commonsense_qa/default.yaml",
        splits={
            "validation": [
                csqa("Where is milk kept? ", ("attic", "fridge", "shoe", "pool", "car"), "B"),
                csqa("What writes?", ("a pen", "a cup", "ice", "a key", "rain"), "A"),
            ],
            "train": [
                csqa("Where do fish live?", ("water", "fire", "air", "sand", "trees"), "A"),
                csqa("What cuts?", ("a cup", "a bed", "a knife", "milk", "fog"), "C"),
                csqa("What rolls?", ("a wall", "a ball", "a roof", "a hill", "a lake"), "B"),
            ],
        },
        native="Question: Where is milk kept?\nA. attic\nB. fridge\nC. shoe\nD. pool\nE. car\nAnswer:",
        choices=("attic", "fridge", "shoe", "pool", "car"),
        gold=1,
        view="native",
    ),
    "anli_r1": Case(
        path="anli/anli_r1.yaml",
        splits={
            "test_r1": [anli("A dog barks.", "An animal makes noise.", 0), anli("It is May.", "It is cold.", 1)],
            "train_r1": [
                anli("Ann runs.", "Ann moves.", 0),
                anli("Bob is old.", "Bob is young.", 2),
                anli("Eve sings.", "Eve is ill.", 1),
            ],
            "dev_r1": [],
        },
        native="A dog barks.\nQuestion: An animal makes noise. True, False, or Neither?\nAnswer:",
        choices=("True", "Neither", "False"),
        gold=0,
        view="native",
    ),
    "agieval_aqua_rat": Case(
        path="agieval/aqua-rat.yaml",
        splits={
            "test": [
                agieval(
                    "Q: What is 3 + 4? Answer Choices: (A)6 (B)7 (C)8 (D)7.0\nA: Among A through D, the answer is",
                    ["(A)6", "(B)7", "(C)8", "(D)7.0"],
                    [1, 3],
                ),
                agieval(
                    "Q: What is 2 + 2? Answer Choices: (A)4 (B)5 (C)6 (D)9\nA: Among A through D, the answer is",
                    ["(A)4", "(B)5", "(C)6", "(D)9"],
                    [0],
                ),
            ]
        },
        native="Q: What is 3 + 4? Answer Choices: (A)6 (B)7 (C)8 (D)7.0\nA: Among A through D, the answer is",
        choices=("6", "7", "8", "7.0"),
        gold=1,
        also=(3,),
        view="native",
        shots=False,
    ),
    **FREE,
}


def yaml_of(case: Case) -> str:
    import lm_eval.tasks

    return str(Path(lm_eval.tasks.__file__).parent / case.path)


def serve(monkeypatch: pytest.MonkeyPatch) -> dict[str, Case]:
    """What ``datasets.load_dataset`` finds from now on: the rows of the one case put in here."""
    found: dict[str, Case] = {}

    def load_dataset(path: str, name: str | None = None, **kwargs: Any) -> Any:
        [case] = found.values()
        columns = next(iter(case.splits.values()))[0].keys()
        empty = {column: [] for column in columns}
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_list(rows) if rows else datasets.Dataset.from_dict(empty)
                for split, rows in case.splits.items()
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    # lm-eval asks pip and the shell about this machine, for a second each time.
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", str)
    return found
