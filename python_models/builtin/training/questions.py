"""What is asked about a sample, in many wordings, and the answers.

A wording is a template: `[a|b]` picks one of the alternatives and `{name}` is filled in.
"""

import random
import re
from dataclasses import dataclass

from .data import COLOURS, SHAPES, TONES, Clip, Scene, Shape, Sound
from .wordings import NO_PICTURE, NO_SOUND, NO_VIDEO, SMALL_TALK, UNANSWERABLE, UNKNOWN, WORDINGS


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer; `task` groups them for the accuracy table."""

    task: str
    question: str
    answer: str


NTH = ("first", "second")


def expand(rng: random.Random, template: str, **slots: str) -> str:
    """One wording of a template."""
    text = re.sub(r"\[([^\]]*)\]", lambda m: rng.choice(m[1].split("|")), template)
    for name, value in slots.items():
        text = text.replace("{" + name + "}", value)
    return re.sub(r" +([?.!]|$)", r"\1", re.sub(r"  +", " ", text)).replace(" a orange", " an orange")


def manner(rng: random.Random, text: str) -> str:
    """The same question in another manner: lower case, without the mark, with a polite start."""
    if rng.random() < 0.1 and text[0] not in "I":
        start = rng.choice(
            ("Please tell me: ", "Tell me: ", "Question: ", "Please answer: ", "Hi! ", "Look at this. ", "OK. ")
        )
        text = start + text
    if rng.random() < 0.06:
        text += rng.choice((" Answer briefly.", " Answer in one word.", " Please.", " Thanks!", " Be short."))
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.12:
        text = text.rstrip("?.!")
    return text


def ask(rng: random.Random, key: str, answer: str, task: str = "", **slots: str) -> Turn:
    """A turn of the kind `key`."""
    return Turn(task or key, manner(rng, expand(rng, rng.choice(WORDINGS[key]), **slots)), answer)


def article(noun: str) -> str:
    """'a red circle', 'an orange star'."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def place(x: float, y: float, width: int, height: int) -> tuple[str, float]:
    """The name of one of nine regions, and how far the point is from its border (share of the side)."""
    u, v = x / width, y / height
    column, row = min(2, int(3 * u)), min(2, int(3 * v))
    name = " ".join(p for p in (("top", "", "bottom")[row], ("left", "", "right")[column]) if p) or "centre"
    return name, min(abs(u - 1 / 3), abs(u - 2 / 3), abs(v - 1 / 3), abs(v - 2 / 3))


def at(name: str) -> str:
    """'at the top left', 'in the centre'."""
    return ("in the " if name == "centre" else "at the ") + name


def listing(items: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]])) if items else "nothing"


def describe(scene: Scene, places: bool = True) -> str:
    """Everything in a scene, in reading order."""
    found = []
    for shape in scene.shapes:
        where, _ = place(shape.x, shape.y, scene.width, scene.height)
        row, column = int(3 * shape.y / scene.height), int(3 * shape.x / scene.width)
        noun = article(f"{shape.colour} {shape.kind}")
        found.append((row, column, shape.x, f"{noun} {at(where)}" if places else noun))
    items = [text for *_, text in sorted(found)]
    return listing(items + ([f"the text {scene.text}"] if scene.text else []))


def only(scene: Scene, shape: Shape) -> str:
    """The shortest name that fits this shape alone, or nothing."""
    same_kind = [s for s in scene.shapes if s.kind == shape.kind]
    both = [s for s in same_kind if s.colour == shape.colour]
    return shape.kind if len(same_kind) == 1 else f"{shape.colour} {shape.kind}" if len(both) == 1 else ""


def scene_turn(rng: random.Random, scene: Scene, task: str) -> Turn | None:
    """One question of a kind about a picture; None where the picture does not allow it."""
    shapes = scene.shapes
    if task == "unknown":
        return unknown(rng)
    if task == "text":
        return ask(rng, "text", scene.text) if scene.text else None
    if task == "no_text":
        return None if scene.text else ask(rng, "text", "There is no text.", task)
    if task == "no_sound":
        return ask(rng, rng.choice(("digits", "tone")), NO_SOUND, task) if rng.random() < 0.5 else None
    if task == "where_text":
        if not scene.text:
            return None
        left, right = scene.glyphs[0], scene.glyphs[-1]
        name, margin = place((left[1] + right[3]) / 2, (left[2] + left[4]) / 2, scene.width, scene.height)
        return ask(rng, task, name) if margin > 0.04 else None
    if task == "describe":
        return ask(rng, task, describe(scene))
    if task == "count":
        return ask(rng, task, str(len(shapes)))
    if task == "is_there":
        if shapes and rng.random() < 0.5:
            shape = rng.choice(shapes)
            thing = rng.choice((shape.kind, f"{shape.colour} {shape.kind}", f"{shape.colour} shape"))
        else:
            thing = rng.choice((rng.choice(SHAPES), f"{rng.choice(tuple(COLOURS))} {rng.choice(SHAPES)}"))
        names = {n for s in shapes for n in (s.kind, f"{s.colour} {s.kind}", f"{s.colour} shape")}
        return ask(rng, task, "yes" if thing in names else "no", thing=thing)
    if not shapes:
        return None
    shape = rng.choice(shapes)
    if task == "count_colour":
        colour = shape.colour if rng.random() < 0.7 else rng.choice(tuple(COLOURS))
        return ask(rng, task, str(sum(s.colour == colour for s in shapes)), colour=colour)
    if task == "count_shape":
        kind = shape.kind if rng.random() < 0.7 else rng.choice(SHAPES)
        return ask(rng, task, str(sum(s.kind == kind for s in shapes)), shape=kind)
    if task == "colour":
        if len(shapes) == 1:
            return ask(rng, "colour", shape.colour, shape=shape.kind)
        alone = sum(s.kind == shape.kind for s in shapes) == 1
        return ask(rng, "colour_of", shape.colour, "colour", shape=shape.kind) if alone else None
    if task == "shape":
        if len(shapes) == 1 and rng.random() < 0.8:
            return ask(rng, "shape", shape.kind)
        alone = sum(s.colour == shape.colour for s in shapes) == 1
        return ask(rng, "shape_of", shape.kind, "shape", colour=shape.colour) if alone else None
    if task == "absent":
        kind = rng.choice([k for k in SHAPES if all(s.kind != k for s in shapes)])
        return ask(rng, rng.choice(("colour_of", "where")), f"There is no {kind}.", task, shape=kind, thing=kind)
    if task in ("where", "what_at"):
        name, margin = place(shape.x, shape.y, scene.width, scene.height)
        here = [s for s in shapes if place(s.x, s.y, scene.width, scene.height)[0] == name]
        if margin < 0.04:
            return None
        if task == "what_at":
            return ask(rng, task, article(f"{shape.colour} {shape.kind}"), place=name) if len(here) == 1 else None
        thing = only(scene, shape)
        if thing and len(shapes) == 1 and rng.random() < 0.4:
            thing = rng.choice(("shape", "object"))
        return ask(rng, task, name, thing=thing) if thing else None
    if task in ("biggest", "smallest"):
        order = sorted(shapes, key=lambda s: s.radius, reverse=task == "biggest")
        if len(order) < 2 or max(order[0].radius, order[1].radius) < 1.35 * min(order[0].radius, order[1].radius):
            return None
        return ask(rng, task, f"the {order[0].colour} {order[0].kind}")
    raise ValueError(task)


SCENE_TASKS = {
    "describe": 2.0,
    "shape": 3.0,
    "colour": 3.0,
    "count": 3.0,
    "text": 8.0,
    "where": 2.0,
    "count_colour": 0.7,
    "count_shape": 0.7,
    "what_at": 1.0,
    "is_there": 1.2,
    "biggest": 0.5,
    "smallest": 0.5,
    "absent": 0.5,
    "unknown": 0.7,
    "no_text": 0.3,
    "no_sound": 0.3,
    "where_text": 0.4,
}


def scene_turns(rng: random.Random, scene: Scene, count: int) -> list[Turn]:
    """Several different questions about one picture."""
    turns: list[Turn] = []
    weights = dict(SCENE_TASKS)
    while len(turns) < count:
        task = rng.choices(list(weights), list(weights.values()))[0]
        turn = scene_turn(rng, scene, task)
        if turn is not None and all(turn.question != t.question for t in turns):
            turns.append(turn)
            weights[task] *= 0.3
        else:
            weights[task] *= 0.7
    return turns


def act(action: str, before: str, after: str) -> str:
    """'moving left', 'changing colour from red to blue'."""
    return f"{action} from {before} to {after}" if action == "changing colour" else action


def clip_turns(rng: random.Random, moment: Clip, count: int, first: str = "") -> list[Turn]:
    """Questions about a clip; `first` names the kind of the first one."""
    shapes = moment.scene.shapes
    turns: list[Turn] = []
    tasks = ["motion"] * 4 + ["describe_video", "colour", "shape", "count", "unknown"]
    while len(turns) < count:
        task = first if first and not turns else rng.choice(tasks)
        i = rng.randrange(len(shapes))
        shape, action = shapes[i], moment.actions[i]
        steady = action != "changing colour"
        if task == "motion" and len(shapes) == 1:
            turn = ask(rng, "motion", action, thing=rng.choice((shape.kind, "shape")))
        elif task == "motion":
            thing = shape.kind if rng.random() < 0.5 or not steady else f"{shape.colour} {shape.kind}"
            turn = ask(rng, "motion_of", action, "motion", thing=thing)
        elif task == "describe_video":
            parts = []
            for s, a, end in zip(shapes, moment.actions, moment.ends, strict=True):
                noun = s.kind if a == "changing colour" else f"{s.colour} {s.kind}"
                parts.append(f"{article(noun)} {act(a, s.colour, end[4])}")
            turn = ask(rng, task, listing(parts))
        elif task == "colour" and steady:
            key = "colour" if len(shapes) == 1 else "colour_of"
            turn = ask(rng, key, shape.colour, "clip colour", shape=shape.kind)
        elif task == "shape" and (len(shapes) == 1 or steady):
            key = "shape" if len(shapes) == 1 else "shape_of"
            turn = ask(rng, key, shape.kind, "clip shape", colour=shape.colour)
        elif task == "count":
            turn = ask(rng, "count", str(len(shapes)), "clip count")
        else:
            turn = unknown(rng)
        if all(turn.question != t.question for t in turns):
            turns.append(turn)
    return turns


def sound_turns(rng: random.Random, sound: Sound, count: int, first: str = "") -> list[Turn]:
    """Questions about a sound."""
    turns: list[Turn] = []
    while len(turns) < count:
        task = (
            first
            if first and not turns
            else rng.choice(("main", "main", "main", "sound", "part", "unknown", "no_picture"))
        )
        if task == "main":
            turn = ask(rng, "tone", sound.tone) if sound.tone else ask(rng, "digits", sound.digits)
        elif task == "sound":
            turn = ask(rng, task, article(sound.tone + " tone") if sound.tone else f"a voice saying {sound.digits}")
        elif task == "part" and sound.digits:
            key, answer = rng.choice(
                (
                    ("digit_count", str(len(sound.digits))),
                    ("first_digit", sound.digits[0]),
                    ("last_digit", sound.digits[-1]),
                )
            )
            turn = ask(rng, key, answer)
        elif task == "no_picture":
            turn = absent_media(rng, picture=True)
        else:
            turn = unknown(rng)
        if all(turn.question != t.question for t in turns):
            turns.append(turn)
    return turns


def pair_turns(rng: random.Random, pair: tuple[Scene, Scene], count: int) -> list[Turn]:
    """Questions that compare two pictures."""
    a, b = pair
    turns: list[Turn] = []
    single = len(a.shapes) == len(b.shapes) == 1
    while len(turns) < count:
        task = rng.choice(
            ("same_colour", "same_shape", "more", "which_has", "which_has", "in_nth", "in_nth", "count_nth", "differ")
        )
        n = rng.randrange(2)
        turn = None
        if task == "same_colour" and single:
            turn = ask(rng, task, "yes" if a.shapes[0].colour == b.shapes[0].colour else "no", "pair")
        elif task == "same_shape" and single:
            turn = ask(rng, task, "yes" if a.shapes[0].kind == b.shapes[0].kind else "no", "pair")
        elif task == "more" and not single:
            more = len(a.shapes) - len(b.shapes)
            turn = ask(rng, task, "the first" if more > 0 else "the second" if more < 0 else "both the same", "pair")
        elif task == "which_has":
            shape = rng.choice(pair[n].shapes)
            other = pair[1 - n].shapes
            names = [shape.kind] * all(s.kind != shape.kind for s in other)
            names += [f"{shape.colour} shape", f"{shape.colour} one"] * all(s.colour != shape.colour for s in other)
            names += [f"{shape.colour} {shape.kind}"] * all(
                (s.kind, s.colour) != (shape.kind, shape.colour) for s in other
            )
            turn = ask(rng, task, f"the {NTH[n]}", "pair", thing=rng.choice(names)) if names else None
        elif task == "in_nth":
            turn = ask(rng, task, describe(pair[n], places=False), "pair", nth=NTH[n])
        elif task == "count_nth":
            turn = ask(rng, task, str(len(pair[n].shapes)), "pair", nth=NTH[n])
        elif task == "differ" and single:
            turn = ask(rng, task, f"The first shows {describe(a, False)}, the second {describe(b, False)}.", "pair")
        if turn is not None and all(turn.question != t.question for t in turns):
            turns.append(turn)
    return turns


def unknown(rng: random.Random) -> Turn:
    """A question that the model cannot answer."""
    return Turn("don't know", manner(rng, expand(rng, rng.choice(UNANSWERABLE))), UNKNOWN)


def small_talk(rng: random.Random) -> Turn:
    """A greeting or a question about the model."""
    wordings, answer = rng.choice(SMALL_TALK)
    text = expand(rng, rng.choice(wordings))
    return Turn("small talk", text.lower() if rng.random() < 0.2 else text, answer)


def absent_media(rng: random.Random, picture: bool = False) -> Turn:
    """A question about media that is not there."""
    keys = {
        NO_PICTURE: (
            "describe",
            "shape",
            "colour",
            "count",
            "text",
            "where",
            "what_at",
            "is_there",
            "shape_of",
            "colour_of",
            "biggest",
        ),
        NO_VIDEO: ("motion", "describe_video", "motion_of"),
        NO_SOUND: ("digits", "tone", "digit_count", "first_digit", "sound"),
    }
    answer = NO_PICTURE if picture else rng.choice(tuple(keys))
    key = rng.choice(keys[answer])
    if picture:
        key = rng.choice(("shape", "colour", "text"))
    kind, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    slots = {"shape": kind, "colour": colour, "thing": f"{colour} {kind}", "place": "top left"}
    return ask(rng, key, answer, "no media", **slots)


def talk_turns(rng: random.Random, count: int) -> list[Turn]:
    """A conversation without media."""
    kinds = (small_talk, unknown, absent_media)
    return [rng.choices(kinds, (0.45, 0.3, 0.25))[0](rng) for _ in range(count)]


def wordings_corpus() -> list[str]:
    """Every word that the questions and answers can hold, for the tokenizer."""
    texts = [part for group in WORDINGS.values() for part in group] + UNANSWERABLE
    texts += [text for wordings, _ in SMALL_TALK for text in wordings] + [answer for _, answer in SMALL_TALK]
    texts = [re.sub(r"[\[\]|{}]", " ", text) for text in texts]
    texts += [
        f"{article(f'{c} {s}')} {at(p)} and"
        for c in COLOURS
        for s in SHAPES
        for p in ("top left", "bottom right", "centre")
    ] * 2
    texts += [f"{c} to {s}s" for c in COLOURS for s in SHAPES]
    texts += [
        UNKNOWN,
        NO_PICTURE,
        NO_VIDEO,
        NO_SOUND,
        *TONES,
        "both the same",
        "the first",
        "the second",
        "yes",
        "no",
        "changing colour from",
    ]
    return [
        *texts,
        "moving left",
        "moving right",
        "moving up",
        "moving down",
        "growing",
        "shrinking",
        "There is no text.",
        "a voice saying",
    ]
