"""The texts of the built-in calibration set: questions for any picture, and short dialogues in two languages.

Data only.
"""

from __future__ import annotations

IMAGE_PROMPTS = (
    "Describe this image in detail.",
    "What is written in this image? Write down all the text.",
    "What can be seen here, and how many of each thing are there?",
    "Give a short caption for this picture.",
    "List the most important facts that this image shows.",
    "请详细描述这张图片。",
    "图片里写了什么文字？请全部写出来。",
    "图中有哪些物体？它们在什么位置？",
)

# (prompt, answer)
TEXTS = (
    (
        "Why does bread rise?",
        "Yeast feeds on the sugars in the flour and gives off carbon dioxide. The gas is caught in the stretchy "
        "network of gluten, so the dough swells. In the oven the bubbles grow once more before heat sets the crumb.",
    ),
    (
        "Write a Python function that counts the vowels in a string.",
        "```python\ndef count_vowels(text: str) -> int:\n    return sum(letter in 'aeiou' for letter in text.lower())\n"
        "```\nIt lowers the text first, so that capital letters count as well.",
    ),
    (
        "A train leaves at 9:40 and arrives at 13:05. How long is the journey?",
        "From 9:40 to 13:00 are 3 hours and 20 minutes. Five more minutes make 3 hours and 25 minutes.",
    ),
    (
        "Summarize: The meeting was moved from Tuesday to Thursday because two of the five members were ill. The room "
        "stays the same, the agenda gains one item: the budget for the coming year.",
        "The meeting is now on Thursday in the same room, and next year's budget was added to the agenda.",
    ),
    (
        "Translate into Chinese: The library opens at eight in the morning and closes at six in the evening.",
        "图书馆早上八点开门，晚上六点关门。",
    ),
    (
        "Which is heavier, a litre of oil or a litre of water?",
        "A litre of water. It weighs about 1 kg, while a litre of cooking oil weighs about 0.92 kg, which is why oil "
        "floats on water.",
    ),
    (
        "Give me the address as JSON: Anna Weber, Lindenweg 12, 80331 Munich, Germany.",
        '{"name": "Anna Weber", "street": "Lindenweg 12", "postcode": "80331", "city": "Munich", "country": "Germany"}',
    ),
    (
        "What should I check before a long bicycle tour?",
        "1. Tyres: pressure and tread.\n2. Brakes: pads and cables.\n3. Chain: clean and oiled.\n4. Lights: front and "
        "rear.\n5. Tools: a pump, a spare tube and tyre levers.\nAnd take enough water.",
    ),
    (
        "为什么天空是蓝色的？",
        "阳光进入大气层后，会被空气分子散射。蓝光的波长短，比红光更容易被散射，所以我们从各个方向看到的都是蓝色的光。",
    ),
    (
        "请写一段介绍西红柿炒鸡蛋做法的文字。",
        "先把三个鸡蛋打散，加少许盐，炒熟后盛出。再把两个西红柿切块，放入锅中炒出汁，加一点糖。最后把鸡蛋倒回锅里，"
        "翻炒均匀即可。",
    ),
    (
        "小明有24个苹果，分给6个朋友，每人几个？还剩几个？",
        "24除以6等于4，所以每个朋友分到4个苹果，没有剩余。",
    ),
    (
        "把下面的句子翻译成英文：明天下午有雨，出门请带伞。",
        "It will rain tomorrow afternoon; please take an umbrella when you go out.",
    ),
)
