"""Untidy support mails and the JSON tickets that a service desk wants of them, drawn from a seed."""

import json
import random
import re
from collections.abc import Mapping, Sequence

REQUEST = "Mail to JSON ticket (customer, order, product, problem, urgent):"


def _words(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = _words("""
    Aisha Alan Beatriz Boris Carmen Chidi Dana Dimitri Elif Emeka Farah Felix Greta Hana Hugo Irene Ivan Jamal Jun Karin
    Kofi Lars Leila Marta Mei Nadia Nils Olga Omar Petra Priya Quentin Rosa Samir Sofia Tariq Uma Viktor Wanda Yusuf Zoe
""")
LAST_NAMES = _words("""
    Abara Bauer Castillo Dlamini Eriksen Farouk Gupta Haddad Ito Jensen Kowalski Lindqvist Moreau Nakamura Okafor Petrov
    Quist Romano Santos Tanaka Ueda Vargas Weber Xu Yilmaz Zeller
""")
COLOURS = _words("black blue brown copper green grey orange pink purple red silver white yellow")
THINGS = _words("""
    backpack blender camera chair clock fan heater jacket kettle keyboard lamp mirror mixer phone pillow printer radio
    rug scale scooter speaker suitcase table tent toaster vase wallet watch
""")

# Ways to say it, `{thing}` being the product; the key is what the ticket calls the problem.
PROBLEMS: Mapping[str, Sequence[str]] = {
    "late": (
        "the {thing} still has not arrived", "where is my {thing}? I have been waiting for weeks",
        "my {thing} was due last Monday and nothing came", "no sign of the {thing} so far",
        "tracking says my {thing} never left your warehouse",
    ),
    "damaged": (
        "the {thing} came with a crack in it", "my {thing} fell apart on the first day",
        "the box was wet and the {thing} is broken", "there is a big dent in the {thing}",
        "the {thing} arrived in two pieces",
    ),
    "wrong item": (
        "I asked for a {thing} and got something else", "this is not the {thing} I picked",
        "you sent somebody else's parcel instead of my {thing}", "there was no {thing} in the box but another thing",
        "instead of the {thing} you shipped me a toy",
    ),
    "refund": (
        "I sent the {thing} back and want my money", "you still owe me the money for the {thing}",
        "I returned the {thing}, when will I be paid back?", "please pay me back for the {thing}",
        "the {thing} went back to you and my account shows nothing",
    ),
    "billing": (
        "you charged my card twice for the {thing}", "the bill for the {thing} shows the wrong price",
        "I never got an invoice for the {thing}", "my card was charged too much for the {thing}",
        "the {thing} was on sale but I paid the full price",
    ),
}  # fmt: skip
URGENT = (
    "I need this solved today!", "This is urgent.", "Please hurry, it is for a birthday tomorrow.", "Answer ASAP!!",
    "I cannot wait any longer.", "We leave on a trip tonight, so quickly please.",
)  # fmt: skip
CALM = (
    "No rush.", "Take your time.", "Whenever you get to it.", "It can wait until next week.", "There is no hurry.",
    *[""] * 2,
)  # fmt: skip
GREETINGS = ["Hello,", "Hi there", "Dear team,", "Good morning", "hey", "Hi!", "Dear Sir or Madam,", "", "", "", ""]
ASIDES = (
    "My neighbour says you are great.", "I tried to call.", "I bought it as a gift.",
    "We have been customers for years.",
    "The driver was friendly.", "I like your new shop.", "It rained all day.", *[""] * 12,
)  # fmt: skip
ORDERS = ["order {}", "order no. {}", "#{}", "order number {}", "my order was {}", "(order {})", "ref {}"]
CLOSINGS = ["Thanks,", "Regards,", "Best", "Cheers", "Kind regards,", "Sincerely", "Yours,", "Bye", "Thank you", ""]

MAX_TOKENS = 56
"""Of a ticket."""
HELD_OUT_SEED, NUM_HELD_OUT = 1, 32
FIELDS = ("customer", "order", "product", "problem", "urgent")
Record = dict[str, str]


def held_out(trained: Sequence[Record]) -> list[Record]:
    """Records with other mails than those."""
    known = {record["prompt"] for record in trained}
    drawn = records(2 * NUM_HELD_OUT, seed=HELD_OUT_SEED)
    return [record for record in drawn if record["prompt"] not in known][:NUM_HELD_OUT]


def records(count: int, *, seed: int) -> list[Record]:
    """Distinct records, `prompt` with a mail and `completion` with its ticket; more of the same seed begin alike."""
    rng = random.Random(seed)
    found: dict[str, Record] = {}
    while len(found) < count:
        record = _record(rng)
        found.setdefault(record["prompt"], record)
    return list(found.values())


def right_fields(reply: str, ticket: str) -> int:
    """How many fields of a reply are those of the ticket: 0 where the reply is not one JSON object and nothing else."""
    wanted = json.loads(ticket)
    try:
        found = json.loads(reply)
    except json.JSONDecodeError:
        return 0
    return sum(found.get(name) == wanted[name] for name in FIELDS) if isinstance(found, dict) else 0


def _record(rng: random.Random) -> Record:
    problem = rng.choice(list(PROBLEMS))
    urgent = rng.random() < 0.5
    customer = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    product = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
    order = rng.randrange(10_000, 100_000)
    ticket = {"customer": customer, "order": order, "product": product, "problem": problem, "urgent": urgent}
    complaint = _mistyped(rng.choice(PROBLEMS[problem]), rng).format(thing=product)
    body = [
        f"{complaint[0].upper()}{complaint[1:]}{rng.choice(('.', '', '!', '...'))}",
        rng.choice(ORDERS).format(order) + rng.choice((".", "", ",")),
        _mistyped(rng.choice(URGENT if urgent else CALM), rng),
        _mistyped(rng.choice(ASIDES), rng),
    ]
    rng.shuffle(body)
    parts = [rng.choice(GREETINGS), " ".join(filter(None, body)), rng.choice(CLOSINGS), customer]
    mail = rng.choice(("\n", "\n", " ")).join(filter(None, parts))
    return {"prompt": f"{REQUEST}\n\n{_in_some_case(mail, rng)}", "completion": json.dumps(ticket)}


def _mistyped(text: str, rng: random.Random) -> str:
    """With two letters of some words exchanged, or one left out; words with a placeholder stay."""

    def word(match: re.Match[str]) -> str:
        letters = list(match[0])
        if rng.random() > 0.06:
            return match[0]
        place = rng.randrange(1, len(letters) - 1)
        if rng.random() < 0.5:
            letters[place : place + 2] = letters[place : place + 2][::-1]
        else:
            del letters[place]
        return "".join(letters)

    return re.sub(r"(?<!\{)\b[a-z]{4,}\b(?!\})", word, text)


def _in_some_case(mail: str, rng: random.Random) -> str:
    kind = rng.random()
    return mail.lower() if kind < 0.25 else mail.upper() if kind < 0.3 else mail
