"""Things to know in six topics, as a text states them and as a person asks for them.

A base model reads every fact in statements. Questions about a fifth of them are held out: who has
learnt to answer in a sentence can answer those as well, for the fact itself was read.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

TEST_SHARE = 0.2  # of the facts of a topic


@dataclass(frozen=True)
class Topic:
    """How the facts of a topic are stated and asked; `{a}` is given, `{b}` is to be known."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    follow_up: str  # a later turn that leaves the rest of the question out
    answer: str  # to both; one of the statements
    facts: tuple[tuple[str, str], ...]  # (a, b)


def _table(text: str) -> tuple[tuple[str, str], ...]:
    """`a:b, a:b` as pairs."""
    pairs = [entry.strip().split(":") for entry in text.split(",")]
    return tuple((a.strip(), b.strip()) for a, b in pairs)


DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December".split()
)
_RINGS = (DAYS, MONTHS)
_NEXT = [(f"after {r[i - 1]}", r[i]) for r in _RINGS for i in range(len(r))]
_BACK = [(f"before {r[i]}", r[i - 1]) for r in _RINGS for i in range(len(r))]

TOPICS = {
    "capitals": Topic(
        ("The capital of {a} is {b}.", "{b} is the capital of {a}.", "{a}: {b}.",
         "In {a}, the capital is {b}.", "{a} has its capital in {b}."),
        ("What is the capital of {a}?", "Which city is the capital of {a}?"),
        "And of {a}?",
        "The capital of {a} is {b}.",
        _table("France:Paris, Italy:Rome, Spain:Madrid, Germany:Berlin, Norway:Oslo, "
               "Sweden:Stockholm, Finland:Helsinki, Denmark:Copenhagen, Poland:Warsaw, "
               "Austria:Vienna, Hungary:Budapest, Greece:Athens, Portugal:Lisbon, Ireland:Dublin, "
               "Belgium:Brussels, Russia:Moscow, Ukraine:Kyiv, Romania:Bucharest, Croatia:Zagreb, "
               "Egypt:Cairo, Kenya:Nairobi, Morocco:Rabat, Japan:Tokyo, China:Beijing, "
               "India:Delhi, Thailand:Bangkok, Vietnam:Hanoi, Nepal:Kathmandu, Iran:Tehran, "
               "Turkey:Ankara, Canada:Ottawa, Cuba:Havana, Peru:Lima, Chile:Santiago, "
               "Brazil:Brasilia, Uruguay:Montevideo"),
    ),
    "elements": Topic(
        ("The symbol of {a} is {b}.", "{a}: {b}.", "{b} is the symbol of {a}.",
         "In formulas, {a} is written {b}.", "The element {a} has the symbol {b}."),
        ("What is the symbol of {a}?", "Which symbol does {a} have?"),
        "And of {a}?",
        "The symbol of {a} is {b}.",
        _table("hydrogen:H, helium:He, lithium:Li, boron:B, carbon:C, nitrogen:N, oxygen:O, "
               "neon:Ne, sodium:Na, magnesium:Mg, aluminium:Al, silicon:Si, phosphorus:P, "
               "sulfur:S, chlorine:Cl, argon:Ar, potassium:K, calcium:Ca, titanium:Ti, "
               "chromium:Cr, manganese:Mn, iron:Fe, cobalt:Co, nickel:Ni, copper:Cu, zinc:Zn, "
               "silver:Ag, tin:Sn, iodine:I, xenon:Xe, tungsten:W, platinum:Pt, gold:Au, "
               "mercury:Hg, lead:Pb, uranium:U"),
    ),
    "status": Topic(
        ("HTTP status {a} means {b}.", "The server sent {a}, {b}.", "{a} is the status {b}.",
         "HTTP/1.1 {a} {b}", "A response with status {a} says {b}."),
        ("What does HTTP status {a} mean?", "What is HTTP status {a}?"),
        "And status {a}?",
        "HTTP status {a} means {b}.",
        _table("100:Continue, 101:Switching Protocols, 200:OK, 201:Created, 202:Accepted, 204:No "
               "Content, 206:Partial Content, 300:Multiple Choices, 301:Moved Permanently, "
               "302:Found, 303:See Other, 304:Not Modified, 400:Bad Request, 401:Unauthorized, "
               "402:Payment Required, 403:Forbidden, 404:Not Found, 405:Method Not Allowed, "
               "406:Not Acceptable, 408:Request Timeout, 409:Conflict, 410:Gone, 423:Locked, "
               "429:Too Many Requests, 500:Internal Server Error, 501:Not Implemented, 502:Bad "
               "Gateway, 503:Service Unavailable, 504:Gateway Timeout, 508:Loop Detected"),
    ),
    "files": Topic(
        ("The type of {a} files is {b}.", "{a} files are {b}.", "Content-Type: {b} ({a})",
         "{b} is the type of {a} files.", "A file that ends in {a} has type {b}."),
        ("What is the type of a {a} file?", "Which type does a {a} file have?"),
        "And of a {a} file?",
        "The type of {a} files is {b}.",
        _table(".html:text/html, .css:text/css, .csv:text/csv, .txt:text/plain, .md:text/markdown, "
               ".xml:text/xml, .js:text/javascript, .png:image/png, .jpg:image/jpeg, "
               ".gif:image/gif, .bmp:image/bmp, .svg:image/svg+xml, .mp3:audio/mpeg, "
               ".wav:audio/x-wav, .aac:audio/aac, .mp4:video/mp4, .mov:video/quicktime, "
               ".json:application/json, .pdf:application/pdf, .zip:application/zip, "
               ".gz:application/gzip, .tar:application/x-tar, .rtf:application/rtf, "
               ".tex:application/x-tex"),
    ),
    "calendar": Topic(
        ("{b} comes right {a}.", "What comes right {a} is {b}.", "Right {a} comes {b}."),
        ("What comes right {a}?", "What is it that comes {a}?"),
        "And {a}?",
        "What comes right {a} is {b}.",
        tuple(_NEXT + _BACK),
    ),
    "sums": Topic(
        (">>> {a}\n{b}", "{a} = {b}", "The sum {a} is {b}.", "{a} makes {b}."),
        ("What is {a}?", "How much is {a}?"),
        "And {a}?",
        "The sum {a} is {b}.",
        tuple((f"{a} + {b}", str(a + b)) for a in range(1, 10) for b in range(1, 10)),
    ),
}  # fmt: skip


def facts_of(topic: str, split: str) -> list[tuple[str, str]]:
    """The facts of a topic whose questions belong to a split, in a fixed order.

    Args:
        topic: a key of `TOPICS`.
        split: "train" or "test"; which fact belongs where depends on no seed.
    """
    facts = TOPICS[topic].facts
    order = sorted(facts, key=lambda fact: blake2b(f"{topic} {fact[0]}".encode()).digest())
    held_out = set(order[: round(TEST_SHARE * len(facts))])
    return [fact for fact in facts if (fact in held_out) is (split == "test")]
