"""Lines that the tokenizers of test checkpoints are trained on.

Plain prose, some JSON, some code: enough for a few hundred merges that tests meet again.
"""

from typing import Final

LINES: Final = """\
A diffusion language model writes a whole block of text at once and then refines it.
It starts from random words, and with every step it keeps the words that it is sure of.
The words that it is not sure of become random again, until the whole block is stable.
Then the next block begins, and it can read everything that was written before it.
The user asked a question and the model answered in one short sentence.
What is the capital of France? The capital of France is Paris, a city on the river Seine.
Once upon a time there was a small house at the edge of the forest, where nobody lived.
The quick brown fox jumps over the lazy dog, and the dog does not care about the fox at all.
Every morning the baker opened the shop, and every evening the lights in the window went out.
Please write a list of the things that you would take with you on a long journey by train.
Water, bread, a warm coat, a good book, some money, and a letter from an old friend.
The answer is correct if each number is used only once in each row and in each column.
{"name": "Alice", "age": 30, "city": "Paris", "job": "pilot", "active": true, "score": 1.5}
{"name": "Bob", "age": 41, "city": "Berlin", "job": "teacher", "active": false, "score": null}
[{"id": 1, "text": "first"}, {"id": 2, "text": "second"}, {"id": 3, "text": "third"}]
def add(first, second):
    return first + second
for index in range(10):
    print(index, add(index, 1))
if value is None:
    raise ValueError("the value must be a number")
The image shows a red square on a white background. Describe the image in a few words.
Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday are the days of the week.
In the beginning the number of steps was large, later on it became smaller and smaller.
""".splitlines()
