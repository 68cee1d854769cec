"""The words of the synthetic pictures, and the split that each of them belongs to.

A word's split depends only on its spelling (CRC-32). A word of the test stream is therefore never drawn or asked for in
training, whether it comes from a list or is invented. This module does not know fonts or layouts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from zlib import crc32

SPLITS = ("train", "validation", "test")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ITEMS = _listed(
    """
    apple apricot bacon bagel banana basil bean beef beer beet berry biscuit bread brush burger butter cable cake
    candle candy carrot celery cereal charger cheese cherry chicken chips chives cider clam cloth clove cocoa coffee
    comb cookie corn crab cream crisps cumin curry date dates dill donut duck egg fig figs filter fish flour foil
    fries garlic gel ginger glove glue goose grape gravy gum ham hammer herbs honey jam jelly juice kale kebab
    ketchup kiwi knife lamb lamp leek lemon lentil lettuce lime lotion mango map maple melon milk mint mop muffin
    mug mussel mustard nail nectar noodle nut nuts oat oats oil olive onion orange oregano oyster paint pan paper
    pasta paste pasty peach pear peas pecan pen pepper pickle pie pizza plate plum pork potato prawn pretzel prune
    pump quiche radish raisin ramen razor ribs rice roll rope rum sage salad salmon salsa salt sauce scone seed
    shampoo shrimp soap socks soda soup soy spice spinach sponge squash steak stew straw sugar sushi syrup tape tea
    thyme tofu tomato tongs torch towel trout tuna turkey twine vanilla veal vinegar wafer waffle walnut water wax
    wheat whisk wine wipes wire wrap yeast yogurt
    """
)

PLACES = _listed(
    """
    airport arcade arena atrium avenue bakery bank bar barber bay bazaar beach bistro bridge cabin cafe camp canal
    canteen castle cellar chapel church cinema city clinic club coast college corner cottage court cove creek dairy
    deli depot diner dock drive east exit factory farm ferry field fjord forest forge fort fountain gallery garage
    garden gate glen grange green grill grove guard gym hall harbour harvest haven hill hostel hotel house inn
    island jetty junction kiosk kitchen lake lane library lift lobby lodge loft lounge manor marina market meadow
    mill mine motel museum north oasis office orchard outlet palace park path pharmacy pier plaza point pond pool
    port post quarry quay ranch reef ridge river road roof room salon school shelter shop south square stable
    stadium station store street studio suite summit temple terrace theatre toilet tower town trail tunnel vale
    valley villa village vista ward warehouse west wharf wood works yard
    """
)

NAMES = _listed(
    """
    ada alba alma amir amos anna arlo asha axel bela ben bo cara carl cleo cora dana dara dean diego dora edith
    elena eli elsa emil emma enzo erik esme eva ezra faye felix finn flora frank gia gina greta hana hans hugo ida
    igor ines iris isla ivan jade jan jack jonas joel jude julia kai karl kate kim kira lara lars lea leo levi lila
    lina luca lucy luis mara marc maria max mia mila mona nadia nash nico nils nina noah nora olga omar oscar otto
    owen paul petra pia quinn rafa rita rosa ruby ruth sami sara seth silas sofia sven tara theo tina tom uma vera
    viola wade wanda yara yves zara zoe
    """
)

CHINESE_ITEMS = _listed(
    """
    米饭 面条 牛奶 鸡蛋 苹果 香蕉 绿茶 红茶 咖啡 面包 牛肉 鱼片 豆腐 白菜 土豆 果汁 啤酒 白糖 食盐
    豆油 鸡肉 水果 牛排 蛋饼 豆浆 米粉 鱼丸 菜汤 茶叶 酒水
    """
)

CHINESE_PLACES = _listed(
    """
    出口 入口 停车场 洗手间 电梯 楼梯 售票处 图书馆 医院 药店 超市 银行 学校 车站 机场 酒店 餐厅
    茶馆 书店 公园 办公室 会议室 服务台 营业中 安全出口 小心地滑 禁止停车 请勿入内 开门 关门 前台 大厅
    地图 手机店 饭店 公司
    """
)

CHINESE_CHARACTERS = "".join(sorted(set("".join((*CHINESE_ITEMS, *CHINESE_PLACES)) + "总计")))

CODE_CHARACTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"

_CONSONANTS = _listed(
    """
    b c d f g h j k l m n p r s t v w z br ch cl cr dr fl gr pl pr sh sl st th tr
    """
)
_VOWELS = _listed("a e i o u a e i o ai ea ee oa ou")
_LETTERS = "abcdefghijklmnopqrstuvwxyz" + "aeiounrstlmdh"
_ENDINGS = ("", "", "", *_listed("n r s l t m nd rk st"))


def split_of(word: str) -> str:
    """Return the split of a word, by its spelling in lower case: 1/10 validation, 2/10 test, the rest training."""
    bucket = crc32(word.lower().encode()) % 10
    return "validation" if bucket == 0 else "test" if bucket in (1, 2) else "train"


def belonging(words: Sequence[str], split: str) -> tuple[str, ...]:
    """Return those of `words` that belong to `split`, in their order."""
    return tuple(word for word in words if split_of(word) == split)


_POOLS = {
    (name, split): belonging(words, split)
    for name, words in {
        "items": ITEMS,
        "places": PLACES,
        "names": NAMES,
        "items-zh": CHINESE_ITEMS,
        "places-zh": CHINESE_PLACES,
    }.items()
    for split in SPLITS
}


def pool(name: str, split: str) -> tuple[str, ...]:
    """Return a list of real words of one split: items, places, names, items-zh or places-zh."""
    return _POOLS[name, split]


def invented_word(rng: random.Random, split: str, max_length: int) -> str:
    """Return an invented word of 3 to `max_length` letters that belongs to `split`. It is made of syllables.

    In training, some words are random letters, and some combine the beginning of one real word with the end of another,
    because real words have letter pairs (tt, tch, mp) that syllables do not have.
    """
    while True:
        kind = rng.random() if split == "train" else 1.0
        if kind < 0.2:
            word = "".join(rng.choices(_LETTERS, k=rng.randint(3, max_length)))
        elif kind < 0.5:
            first, last = (rng.choice(pool(rng.choice(("items", "places", "names")), split)) for _ in range(2))
            word = first[: rng.randint(1, len(first))] + last[rng.randint(1, len(last) - 1) :]
        else:
            word = ""
            for _ in range(rng.randint(1, 3)):
                word += rng.choice(_CONSONANTS) + rng.choice(_VOWELS)
            word += rng.choice(_ENDINGS)
        if 3 <= len(word) <= max_length and split_of(word) == split:
            return word


def invented_chinese(rng: random.Random, split: str, max_length: int) -> str:
    """Return 2 to `max_length` of the known characters that belong to `split` as a word. It need not have a meaning."""
    while True:
        word = "".join(rng.choice(CHINESE_CHARACTERS) for _ in range(rng.randint(2, max_length)))
        if split_of(word) == split:
            return word


def code(rng: random.Random, split: str, length: int) -> str:
    """Return a serial number such as `K7P-42X`, without characters that look alike in many fonts (0/O, 1/I)."""
    while True:
        text = "".join(rng.choice(CODE_CHARACTERS) for _ in range(length))
        if length >= 5 and rng.random() < 0.5:
            middle = length // 2
            text = text[:middle] + "-" + text[middle + 1 :]
        if split_of(text) == split:
            return text
