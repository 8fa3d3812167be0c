"""Makes words.jsonl: words of Shakespeare's plays with what the quickstart's tasks ask about them.

python specs/data/words/make.py > specs/data/words/words.jsonl
"""

import json
import random
import re
from collections import Counter
from pathlib import Path

PLAYS = Path(__file__).parent.parent / "shakespeare"
text = "".join((PLAYS / name).read_text() for name in ("train.txt", "validation.txt"))
counts = Counter(re.findall(r"[a-z]+", text.lower()))
words = sorted(word for word, count in counts.items() if 3 <= len(word) <= 7 and count >= 2)
random.Random(0).shuffle(words)
for word in words[:4000]:
    row = {
        "word": word,
        "reversed": word[::-1],
        "sorted": "".join(sorted(word)),
        "consonants": re.sub("[aeiou]", "", word) or "none",
    }
    print(json.dumps(row))
