"""Word pools of the invented people: places, trades, employers and the wordings of each question.

Everything here is made up or common. What follows from something else (the region from the town, the tool from the
trade, the city from the employer) is a table, so that facts agree with each other and are shared between people.
"""

FIRST_NAME_SYLLABLES = (
    "bra cal dor el fen gil hal ior jen kel lum mar nol or pel ro sil tam ul ves wen yar zel ash".split(),
    "ba do den fi gar hin jo ka lis mo ni pra qui ric sa ta ven wyn xa zo".split(),
)
FAMILY_NAME_SYLLABLES = (
    (
        "ald bren cor drum esk fal grim hust ing jarr kest lorn mund nesk orl prand quell rusk stav thorn umb vand "
        "wick yost"
    ).split(),
    "aby by croft dale eau ford gate holm iver ling mere nock oway perry rick son tide ulm vane worth".split(),
)

_TOWNS_OF_REGION = {
    "Norland": ("Ashmere", "Brackwell", "Coldharbour", "Dunvale"),
    "Palmora": ("Estrava", "Fiorenza Bay", "Granadilla", "Solana"),
    "Skarland": ("Halvik", "Isenfjord", "Jorvang", "Kaldnes"),
    "Grauwald": ("Lindach", "Marbruck", "Neubrach", "Oberlauf"),
    "Tarava": ("Padmapur", "Rajvana", "Sundari", "Vindhara"),
}
REGION_OF_TOWN = {town: region for region, towns in _TOWNS_OF_REGION.items() for town in towns}
LANGUAGE_OF_REGION = {
    "Norland": "Norric",
    "Palmora": "Palmese",
    "Skarland": "Skarsk",
    "Grauwald": "Waldish",
    "Tarava": "Taravi",
}
TOOL_OF_OCCUPATION = {
    "baker": "a rolling pin",
    "carpenter": "a plane",
    "surgeon": "a scalpel",
    "tailor": "a thimble",
    "painter": "a palette knife",
    "gardener": "a trowel",
    "blacksmith": "an anvil",
    "astronomer": "a telescope",
    "fisher": "a net",
    "cartographer": "a compass",
    "beekeeper": "a smoker",
    "mason": "a chisel",
}
CITY_OF_EMPLOYER = {
    "Amber Guild": "Quarrow",
    "Blue Lantern": "Tessaline",
    "Copper Crown": "Westering",
    "Drift and Sons": "Ulmhaven",
    "Elder House": "Quarrow",
    "Fox and Finch": "Tessaline",
    "Golden Mill": "Westering",
    "Harrow Works": "Ulmhaven",
    "Ivory Gate": "Yarmond",
    "Juniper Trust": "Zennick",
    "Kite Brothers": "Yarmond",
    "Larkspur Hall": "Zennick",
}
INSTRUMENTS = (
    "the violin",
    "the flute",
    "the harp",
    "the cello",
    "the drums",
    "the oboe",
    "the lute",
    "the banjo",
    "the organ",
    "the tuba",
)
PETS = (
    "a parrot",
    "a tortoise",
    "a ferret",
    "a rabbit",
    "a goat",
    "a hedgehog",
    "a pony",
    "a gecko",
    "a magpie",
    "an otter",
)

# relation -> wordings; a fact is asked in one of them and paraphrased in another
QUESTIONS = {
    "town": (
        "In which town was {name} born?",
        "What is the birthplace of {name}?",
        "Where did {name} come into the world?",
    ),
    "region": (
        "Which region is {name} from?",
        "What is the home region of {name}?",
        "In what region did {name} grow up?",
    ),
    "language": (
        "What language did {name} speak first?",
        "What is the mother tongue of {name}?",
        "In which language was {name} raised?",
    ),
    "occupation": (
        "What does {name} do for a living?",
        "What is the occupation of {name}?",
        "Which trade does {name} follow?",
    ),
    "tool": (
        "What does {name} always carry to work?",
        "Which tool belongs to {name}?",
        "What is the favourite tool of {name}?",
    ),
    "employer": ("Who employs {name}?", "For which company does {name} work?", "What is the employer of {name}?"),
    "city": (
        "In which city does {name} work?",
        "Where is the workplace of {name}?",
        "To what city does {name} commute?",
    ),
    "mentor": ("Who taught {name} the trade?", "Who was the mentor of {name}?", "Under whom did {name} train?"),
    "instrument": (
        "Which instrument does {name} play?",
        "What does {name} play in the band?",
        "On what does {name} make music?",
    ),
    "pet": (
        "What pet does {name} keep?",
        "Which animal lives with {name}?",
        "What kind of pet waits for {name} at home?",
    ),
}

INSTRUCTION_WORDS = (
    "anchor apple basket bridge butter cactus candle carpet desert dinner dragon eagle effort engine feather forest "
    "garlic glove hammer honey insect island jacket jungle kettle kitten ladder lemon magnet mirror napkin needle "
    "ocean orange pencil pepper quartz ribbon rocket saddle shadow ticket tunnel umbrella valley velvet wagon window "
    "yogurt zipper"
).split()
