"""Cases whose answer is said, not chosen; ``choices`` is the answer alone where the task has none."""

from tests.tasks.lm_eval_rows import ARC, ARC_TRAIN, Case, arc, gsm8k, trivia

FREE = {
    "gsm8k": Case(
        path="gsm8k/gsm8k.yaml",
        splits={
            "test": [
                gsm8k("Ann has 3 apples and buys 4. How many?", "3 + 4 = <<3+4=7>>7", "7"),
                gsm8k("A car costs 1000 and rises by 20. Price?", "1000 + 20 = 1,020", "1,020"),
            ],
            "train": [
                gsm8k("What is 1 + 1?", "1 + 1 = 2", "2"),
                gsm8k("What is 2 + 3?", "2 + 3 = 5", "5"),
                gsm8k("What is 9 - 1?", "9 - 1 = 8", "8"),
            ],
        },
        native="Question: Ann has 3 apples and buys 4. How many?\nAnswer:",
        choices=("7",),
        gold=0,
        view="native",
    ),
    "arc_challenge_chat": Case(
        path="arc/arc_challenge_chat.yaml",
        splits={
            "test": [ARC[0], arc("What do lungs take in?", "sand", "light", "air", "ice", key="C"), ARC[1]],
            "train": ARC_TRAIN,
            "validation": ARC_TRAIN,
        },
        # lm-eval's YAML has the two characters backslash and n in single quotes.
        native="Given the following question and four candidate answers (A, B, C and D), choose the best answer.\\n"
        "Question: Which part of a plant takes up water?\\nA. leaf\\nB. root\\nC. petal\\nD. seed\\nYour response "
        'should end with "The best answer is [the_answer_letter]" where the [the_answer_letter] is one of A, B, C or D.'
        " The best answer is",
        choices=("B",),
        gold=0,
        view="native",
        shots=False,
    ),
    "babi": Case(
        path="babi/babi.yaml",
        splits={
            "test": [
                {"passage": "Ann is in the hall.\n", "question": "Where is Ann?", "answer": "hall"},
                {"passage": "Bob is in the office.\n", "question": "Where is Bob?", "answer": "office"},
                {"passage": "Eve is in the kitchen.\n", "question": "Where is Eve?", "answer": "kitchen"},
            ],
            "train": [
                {"passage": "Jim is in the garden.\n", "question": "Where is Jim?", "answer": "garden"},
                {"passage": "Tom is in the park.\n", "question": "Where is Tom?", "answer": "park"},
            ],
            "valid": [],
        },
        native="Passage: Ann is in the hall.\nQuestion: Where is Ann?\nAnswer:",
        choices=("hall",),
        gold=0,
        view="native",
    ),
    "triviaqa": Case(
        path="triviaqa/default.yaml",
        splits={
            "validation": [
                trivia("Who wrote Emma", "Jane Austen", "Austen"),
                trivia("Which is the capital of France", "Paris", "City of Light"),
                trivia("Which metal is liquid", "Mercury"),
            ],
            "train": [
                trivia("Who painted Guernica", "Picasso"),
                trivia("Which bird is tallest", "Ostrich", "the ostrich"),
                trivia("Which planet has rings", "Saturn"),
            ],
        },
        native="Question: Who wrote Emma?\nAnswer:",
        choices=("Jane Austen",),
        gold=0,
        view="native",
    ),
    "lambada_openai": Case(
        path="lambada/lambada_openai.yaml",
        splits={
            "test": [
                {"text": "He opened the box and found the key"},
                {"text": "She looked at the sky and saw the moon"},
                {"text": "They walked to the sea and swam in the water"},
            ]
        },
        native="He opened the box and found the",
        choices=("key",),
        gold=0,
        view="native",
    ),
}
