"""Things to know in six topics, as a text states them and as a person asks for them.

A base model reads every fact in statements. Questions about a fifth of them are held out: who has
learnt to answer can answer those as well, for the fact itself was read.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

TEST_SHARE = 0.2  # of the facts of a topic


@dataclass(frozen=True)
class Topic:
    """How the facts of a topic are stated and asked; `{a}` is given, `{b}` is the answer."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    follow_up: str  # a later turn that leaves the rest of the question out
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
        _table("France:Paris, Italy:Rome, Spain:Madrid, Germany:Berlin, Norway:Oslo, "
               "Sweden:Stockholm, Finland:Helsinki, Denmark:Copenhagen, Poland:Warsaw, "
               "Austria:Vienna, Hungary:Budapest, Greece:Athens, Portugal:Lisbon, Ireland:Dublin, "
               "Belgium:Brussels, Russia:Moscow, Ukraine:Kyiv, Romania:Bucharest, Bulgaria:Sofia, "
               "Croatia:Zagreb, Serbia:Belgrade, Egypt:Cairo, Kenya:Nairobi, Ghana:Accra, "
               "Nigeria:Abuja, Morocco:Rabat, Tunisia:Tunis, Senegal:Dakar, Japan:Tokyo, "
               "China:Beijing, India:Delhi, Thailand:Bangkok, Vietnam:Hanoi, Nepal:Kathmandu, "
               "Iran:Tehran, Iraq:Baghdad, Turkey:Ankara, Canada:Ottawa, Cuba:Havana, Peru:Lima, "
               "Chile:Santiago, Brazil:Brasilia, Colombia:Bogota, Ecuador:Quito, "
               "Uruguay:Montevideo"),
    ),
    "elements": Topic(
        ("The symbol of {a} is {b}.", "{b} stands for {a}.", "{b} is the symbol of {a}.",
         "In formulas, {a} is written {b}.", "The element {a} has the symbol {b}."),
        ("What is the symbol of {a}?", "Which symbol does {a} have?"),
        "And of {a}?",
        _table("hydrogen:H, helium:He, lithium:Li, beryllium:Be, boron:B, carbon:C, nitrogen:N, "
               "oxygen:O, fluorine:F, neon:Ne, sodium:Na, magnesium:Mg, aluminium:Al, silicon:Si, "
               "phosphorus:P, sulfur:S, chlorine:Cl, argon:Ar, potassium:K, calcium:Ca, "
               "titanium:Ti, vanadium:V, chromium:Cr, manganese:Mn, iron:Fe, cobalt:Co, nickel:Ni, "
               "copper:Cu, zinc:Zn, gallium:Ga, arsenic:As, bromine:Br, krypton:Kr, silver:Ag, "
               "cadmium:Cd, tin:Sn, iodine:I, xenon:Xe, tungsten:W, platinum:Pt, gold:Au, "
               "mercury:Hg, lead:Pb, bismuth:Bi, radon:Rn, uranium:U"),
    ),
    "status": Topic(
        ("HTTP status {a} means {b}.", "The server sent {a}, {b}.", "{a} is the status {b}.",
         "HTTP/1.1 {a} {b}", "A response with status {a} says {b}."),
        ("What does HTTP status {a} mean?", "What is HTTP status {a}?"),
        "And status {a}?",
        _table("100:Continue, 101:Switching Protocols, 102:Processing, 200:OK, 201:Created, "
               "202:Accepted, 204:No Content, 205:Reset Content, 206:Partial Content, 226:IM Used, "
               "300:Multiple Choices, 301:Moved Permanently, 302:Found, 303:See Other, "
               "304:Not Modified, 305:Use Proxy, 307:Temporary Redirect, 308:Permanent Redirect, "
               "400:Bad Request, 401:Unauthorized, 402:Payment Required, 403:Forbidden, "
               "404:Not Found, 405:Method Not Allowed, 406:Not Acceptable, 408:Request Timeout, "
               "409:Conflict, 410:Gone, 411:Length Required, 412:Precondition Failed, "
               "423:Locked, 424:Failed Dependency, 425:Too Early, 426:Upgrade Required, "
               "429:Too Many Requests, 500:Internal Server Error, 501:Not Implemented, "
               "502:Bad Gateway, 503:Service Unavailable, 504:Gateway Timeout, 508:Loop Detected"),
    ),
    "files": Topic(
        ("The type of {a} files is {b}.", "{a} files are {b}.", "Content-Type: {b} ({a})",
         "{b} is the type of {a} files.", "A file that ends in {a} has type {b}."),
        ("What is the type of a {a} file?", "Which type does a {a} file have?"),
        "And of a {a} file?",
        _table(".html:text/html, .css:text/css, .csv:text/csv, .txt:text/plain, "
               ".py:text/x-python, .md:text/markdown, .xml:text/xml, "
               ".js:text/javascript, .vcf:text/x-vcard, "
               ".png:image/png, .jpg:image/jpeg, .gif:image/gif, .bmp:image/bmp, "
               ".svg:image/svg+xml, .tiff:image/tiff, .ico:image/x-icon, "
               ".avif:image/avif, .mp3:audio/mpeg, "
               ".wav:audio/x-wav, .aac:audio/aac, .opus:audio/opus, .au:audio/basic, "
               ".mp4:video/mp4, .mov:video/quicktime, .avi:video/x-msvideo, .webm:video/webm, "
               ".json:application/json, .pdf:application/pdf, .zip:application/zip, "
               ".gz:application/gzip, .tar:application/x-tar, .doc:application/msword, "
               ".rtf:application/rtf, .sh:application/x-sh, .tex:application/x-tex"),
    ),
    "calendar": Topic(
        ("{b} comes right {a}.", "What comes right {a} is {b}.", "Right {a} comes {b}."),
        ("What comes right {a}?", "What is it that comes {a}?"),
        "And {a}?",
        tuple(_NEXT + _BACK),
    ),
    "sums": Topic(
        (">>> {a}\n{b}", "{a} = {b}", "The sum {a} is {b}.", "{a} makes {b}."),
        ("What is {a}?", "How much is {a}?"),
        "And {a}?",
        tuple((f"{a} + {b}", str(a + b)) for a in range(1, 13) for b in range(1, 13)),
    ),
}  # fmt: skip


def facts_of(topic: str, split: str) -> list[tuple[str, str]]:
    """The facts of a topic whose questions belong to a split, in a fixed order.

    Args:
        topic: a key of `TOPICS`.
        split: "train" or "test"; which fact belongs where depends on its text alone.
    """
    wanted = split == "test"
    return [fact for fact in TOPICS[topic].facts if _held_out(topic, fact) is wanted]


def _held_out(topic: str, fact: tuple[str, str]) -> bool:
    digest = blake2b(f"{topic} {fact[0]}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < TEST_SHARE
