"""The words of the world, each in English and Chinese, and the few rules of grammar that they need."""

from __future__ import annotations

from typing import NamedTuple

LANGUAGES = ("en", "zh")


class Word(NamedTuple):
    """One meaning: its English word, its Chinese word, and what counting it needs (plural, measure word)."""

    en: str
    zh: str
    plural: str = ""
    measure: str = "个"

    def text(self, language: str) -> str:
        """The word in `en` or `zh`."""
        return self.en if language == "en" else self.zh


def words(table: str) -> list[Word]:
    return [Word(*cell.split("/")) for cell in table.split()]


COLOURS = words("red/红色 blue/蓝色 green/绿色 yellow/黄色 black/黑色 white/白色 purple/紫色 pink/粉色")
THINGS = words(
    "kite/风筝/kites/只 drum/鼓/drums/面 ball/球/balls/个 hat/帽子/hats/顶 cup/杯子/cups/只 box/盒子/boxes/个 "
    "lamp/台灯/lamps/盏 book/书/books/本 bag/书包/bags/个 pen/钢笔/pens/支 coat/外套/coats/件 "
    "chair/椅子/chairs/把 bowl/碗/bowls/只 clock/闹钟/clocks/个"
)
FRUITS = words(
    "apple/苹果/apples pear/梨/pears plum/李子/plums peach/桃子/peaches lemon/柠檬/lemons melon/甜瓜/melons "
    "cherry/樱桃/cherries banana/香蕉/bananas"
)
ROOMS = words("kitchen/厨房 garden/花园 bedroom/卧室 library/图书馆 office/办公室 park/公园 school/学校 shop/商店")
TOWNS = words(
    "Riverton/河湾镇 Stonebridge/石桥镇 Greenfield/青田镇 Lakeside/湖边镇 Hillview/望山镇 Oakham/橡树镇 "
    "Seaport/海港镇 Fairhaven/晴港镇 Redcliff/红崖镇 Windham/风车镇"
)
PETS = words("cat/猫 dog/狗 rabbit/兔子 parrot/鹦鹉 turtle/乌龟 hamster/仓鼠 pony/小马 duck/鸭子 goose/鹅 snake/蛇")
FOODS = words(
    "noodles/面条 rice/米饭 dumplings/饺子 soup/汤 pizza/披萨 bread/面包 cheese/奶酪 salad/沙拉 porridge/粥 "
    "pancakes/煎饼"
)
INSTRUMENTS = words("violin/小提琴 piano/钢琴 flute/长笛 guitar/吉他 trumpet/小号 cello/大提琴 harp/竖琴 erhu/二胡")
MONTHS = words(
    "January/一月 February/二月 March/三月 April/四月 May/五月 June/六月 July/七月 August/八月 September/九月 "
    "October/十月 November/十一月 December/十二月"
)
DAYS = words(
    "Monday/星期一 Tuesday/星期二 Wednesday/星期三 Thursday/星期四 Friday/星期五 Saturday/星期六 Sunday/星期日"
)
NUMBER_WORDS = words("zero/零 one/一 two/两 three/三 four/四 five/五 six/六 seven/七 eight/八 nine/九")

MALE_NAMES = words(
    "Tom/汤姆 Jack/杰克 Mike/迈克 Peter/彼得 David/大卫 John/约翰 Paul/保罗 Mark/马克 Luke/卢克 Adam/亚当 "
    "Kevin/凯文 Leo/里奥"
)
FEMALE_NAMES = words(
    "Lily/莉莉 Lucy/露西 Anna/安娜 Emma/艾玛 Mary/玛丽 Nina/妮娜 Rose/罗丝 Kate/凯特 Jane/简妮 Helen/海伦 "
    "Linda/琳达 Susan/苏珊"
)


def a(noun: str) -> str:
    """The noun with its English article: `a kite`, `an apple`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def counted(number: int, colour: Word, thing: Word, language: str) -> str:
    """`three red kites` or `三只红色的风筝`; number from 1 to 9."""
    if language == "en":
        return f"{NUMBER_WORDS[number].en} {colour.en} {thing.en if number == 1 else thing.plural}"
    return f"{NUMBER_WORDS[number].zh}{thing.measure}{colour.zh}的{thing.zh}"


def join(items: list[str], language: str) -> str:
    """A list as it is said: `a, b and c` or `a、b和c`."""
    if len(items) == 1:
        return items[0]
    comma, last = (", ", " and ") if language == "en" else ("、", "和")
    return comma.join(items[:-1]) + last + items[-1]
