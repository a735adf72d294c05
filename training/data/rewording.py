"""The project's questions in many other wordings, to train on: so a model reads what is asked, not one sentence.

A wording is put together from parts drawn one by one, so there are more of them than a model can learn by heart. The
answer stays the same, in meaning and in words, and so do the cameras that `Rig.named_in` finds: sectors, classes,
states and tags are never touched. No wording is one of `training.evaluation.paraphrases`: those are kept to evaluate.
"""

import random
import re

OPTIONS = " Please select the correct answer from the following options:"
_OTHER_OPTIONS = " [Choose|Pick] the [right|correct] [answer|option][:|. The options are:]"

_TAG = r"(<c\d+,[^>]*>)"
_PLACE = r"to the ([a-z ]+?) of the ego car"
_EGO = "the ego [car|vehicle]"
_PLACES = (
    f"to the {{sector}} of {_EGO}",
    f"at the {{sector}} of {_EGO}",
    "in the {sector} view",
)
_SHORT = {"front": f"in front of {_EGO}", "back": f"behind {_EGO}"}

# A question's pattern and its other wordings: \1 … are the pattern's groups, `[a|b]` draws one of its parts, and
# {place} and {Place} stand for where the question's group `sector` is.
WORDINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        rf"Are there (.+) {_PLACE}\?",
        (
            r"[Do you see|Can you see|Do you notice|Can you find|Do the cameras show][| any] \1 {place}?",
            r"[Is it true|Is it right|Would you say] that there are \1 {place}?",
            r"{Place}, [are there|do you see|can you see|can you find][| any] \1?",
        ),
    ),
    (
        rf"What are objects {_PLACE}\?",
        (
            r"[What do you see|What can you see|What is there|What do the cameras show] {place}?",
            r"[List|Give|Tell me] [the|all] [objects|things] {place}.",
            r"[Which|What] [objects|things] [are there|do you see|can you find] {place}?",
            r"{Place}, [what do you see|what can you see|what is there|which objects are there]?",
        ),
    ),
    (
        rf"How many (.+) are there {_PLACE}\?",
        (
            r"How many \1 [do you see|can you see|can you find|do the cameras show] {place}?",
            r"[What is|Tell me|Give] the number of \1 {place}[?|.]",
            r"{Place}, how many \1 [are there|do you see|can you find]?",
        ),
    ),
    (
        rf"What is the closest object {_PLACE}\?",
        (
            r"[Which|What] [object|thing] is [closest|nearest] {place}?",
            r"[Tell me|Give] the [closest|nearest] [object|thing] {place}.",
            r"{Place}, [which|what] [object|thing] is [closest|nearest]?",
            r"What is the nearest [object|thing] {place}?",
        ),
    ),
    (
        rf"What is the status of the (.+) that is {_PLACE}\?",
        (
            r"In [which|what] [state|status] is the \1 {place}?",
            r"[Which|What] [state|status] does the \1 {place} have?",
            r"[Tell me|Give] the [state|status] of the \1 {place}.",
            r"{Place}, what is the [state|status] of the \1?",
        ),
    ),
    (
        rf"What is the status of the (.+) that are {_PLACE}\?",
        (
            r"In [which|what] [state|status] are the \1 {place}?",
            r"[Which|What] [state|status] do the \1 {place} have?",
            r"[Tell me|Give] the [state|status] of the \1 {place}.",
            r"{Place}, what is the [state|status] of the \1?",
        ),
    ),
    (
        r"Is there any traffic element in the (.+) view\?",
        (
            r"[Do you see|Can you see|Do you notice|Can you find] [a|any] traffic element in the \1 view?",
            r"In the \1 view, [is there|do you see|can you find] [a|any] traffic element?",
        ),
    ),
    (
        rf"What is the visual description of {_TAG}\?",
        (r"How does[| object] \1 look?", r"[Give|Tell me] [a|the] [|visual ]description of[| object] \1."),
    ),
    (
        rf"What is the observed status of object {_TAG}\?",
        (
            r"In [which|what] [state|status] is[| object] \1?",
            r"[What|Which] [state|status] of[| object] \1 do you see?",
        ),
    ),
    (
        rf"What is the moving status of object {_TAG}\?",
        (r"In [which|what] way does[| object] \1 move?", r"[Tell me|Say] how[| object] \1 moves."),
    ),
    (
        rf"What is the future state of {_TAG}\?",
        (
            r"[What|Tell me what] will[| object] \1 do next?",
            r"In [which|what] state will[| object] \1 be [soon|next]?",
        ),
    ),
    (
        rf"What does {_TAG} mean\?",
        (r"What is the meaning of[| object] \1?", r"[Tell me|Say] what[| object] \1 means."),
    ),
    (
        rf"Is {_TAG} an object that the ego vehicle should consider in the current scene\?",
        (
            rf"Must {_EGO} consider[| object] \1 [here|now|in this scene]?",
            rf"Is[| object] \1 [something|a thing] that {_EGO} [should|must] consider [here|now]?",
        ),
    ),
    (
        rf"Is it necessary for the ego vehicle to take {_TAG} into account\?",
        (
            rf"[Must|Should] {_EGO} take[| object] \1 into account?",
            rf"Is it [needed|important] that {_EGO} takes[| object] \1 into account?",
        ),
    ),
    (
        rf"Would {_TAG} be in the moving direction of the ego vehicle\?",
        (
            rf"[Is|Will][| object] \1[| be] in the [way|path] of {_EGO}?",
            rf"Is[| object] \1 where {_EGO} [moves|is going]?",
        ),
    ),
    (
        rf"Is {_TAG} a traffic sign or a road barrier\?",
        (
            r"Is[| object] \1 [|either ]a road barrier or a traffic sign?",
            r"[Tell me|Say] [if|whether][| object] \1 is a [|road ]barrier or a [|traffic ]sign.",
        ),
    ),
    (
        rf"What object would consider {_TAG} to be most relevant to its decision\?",
        (
            r"For [which|what] object is \1 most [relevant|important] in its decision?",
            r"[Which|What] object [should|must] decide with \1 in mind?",
        ),
    ),
    (
        rf"Are {_TAG} and {_TAG} traffic signs\?",
        (r"Are both \1 and \2 traffic signs?", r"[Tell me|Say] [if|whether] \1 and \2 are traffic signs."),
    ),
    (
        rf"Would {_TAG} take {_TAG} into account\?",
        (r"[Does|Will|Must] \1 take \2 into account?", r"[Does|Will|Must] \1 [mind|consider] \2?"),
    ),
    (
        rf"Based on the observations of {_TAG}, what are possible actions to be taken by {_TAG}\? What is the "
        r"reason\?",
        (
            r"[Given|Seeing] \1, what [can|could|may] \2 do? [Why?|For which reason?]",
            r"[What|Which] action is possible for \2 [given|because of] \1? [Why?|For which reason?]",
        ),
    ),
    (
        rf"Which object is most likely to be occluded by {_TAG}\? Would this object affect the ego vehicle\? Based on "
        r"this object, what action of the ego vehicle is dangerous\?",
        (
            rf"[What|Which object] does \1 most likely [hide|cover]? [Does|Would] it affect {_EGO}? [What|Which] "
            rf"action of {_EGO} is dangerous because of it?",
        ),
    ),
    (
        rf"Based on {_TAG} in this scene, what is the most possible action of the ego vehicle\?",
        (
            rf"[Given|Because of] \1, what will {_EGO} most [likely|possibly] do?",
            rf"[What|Which] action of {_EGO} is most [likely|possible] [given|because of] \1?",
        ),
    ),
    (
        rf"What actions could the ego vehicle take based on {_TAG}\? Why take this action and what's the "
        r"probability\?",
        (
            rf"[Given|Because of] \1, what [can|could|may] {_EGO} do? [Why|For which reason], and with [what|which] "
            "probability?",
        ),
    ),
    (
        rf"What actions taken by the ego vehicle can lead to a collision with {_TAG}\?",
        (
            rf"[What|Which] actions of {_EGO} [can|could|may] end in a collision with \1?",
            rf"By [what|which] actions [can|could|would] {_EGO} hit \1?",
        ),
    ),
    (
        rf"What is the probability of colliding with {_TAG} after the ego vehicle (.+)\?",
        (
            rf"[If|When] {_EGO} \2, [how likely is a collision with \1|how likely is it to hit \1]?",
            rf"How [likely|probable] is a collision with \1 [if|when] {_EGO} \2?",
        ),
    ),
    (
        r"Will water droplets on the glass affect the driver's line of sight\?",
        (
            r"[Do|Can|Could] water droplets on the glass affect [the driver's line of sight|what the driver sees]?",
            r"Is the driver's line of sight affected by water droplets[| on the glass]?",
        ),
    ),
    (
        r"What is the traffic signal that the ego vehicle should pay attention to\?",
        (
            rf"[Which|What] traffic signal [should|must] {_EGO} [follow|mind|watch]?",
            rf"[Tell me|Give] the traffic signal that {_EGO} [should|must] [follow|mind|watch].",
        ),
    ),
    (
        r"What is the target action of the ego vehicle\?",
        (
            rf"What is {_EGO} [about|going] to do?",
            rf"[What|Which] action [does {_EGO} plan|is planned for {_EGO}]?",
            rf"[Tell me|Give] the [target|planned] action of {_EGO}.",
        ),
    ),
    (
        r"In this scenario, what are (safe|dangerous) actions to take for the ego vehicle\?",
        (
            rf"[Which|What] actions are \1 for {_EGO} [here|now|in this scene]?",
            rf"[List|Give|Tell me] actions that are \1 for {_EGO}[| here| now].",
            rf"What [can|could|may] {_EGO} do [here|now] that is \1?",
        ),
    ),
    (
        r"What is the priority of the objects that the ego vehicle should consider\?\(in descending order\)",
        (
            rf"In [which|what] order [should|must] {_EGO} consider the objects?",
            rf"[List|Give] the objects that {_EGO} [should|must] consider, the most important first.",
        ),
    ),
    (
        r"What are the important objects in the current scene\? Those objects will be considered for the future "
        r"reasoning and driving decision\.",
        (r"[Which|What] objects are important [here|now|in this scene] for [reasoning and driving|the decision]?",),
    ),
    (
        r"What object should the ego vehicle notice first when .*",
        (
            rf"[What|Which objects] should {_EGO} notice first, second and third? [Tell me|Say] in which state each "
            rf"is and what {_EGO} should do.",
        ),
    ),
    (
        r"Predict the behavior of the ego vehicle\.",
        (
            rf"[What is|Tell me|Give] the behavior of {_EGO}[?|.]",
            rf"How [does {_EGO} move|does {_EGO} drive|is {_EGO} driving|is {_EGO} moving]?",
            rf"[Where is {_EGO} going, and how fast?|Which way and how fast does {_EGO} drive?]",
        ),
    ),
)
_COMPILED = tuple((re.compile(pattern), templates) for pattern, templates in WORDINGS)


def reword(question: str, rng: random.Random) -> str:
    """A question in other words with the same answer; one that no pattern knows as it is.

    >>> reword("Are there moving cars to the back of the ego car?", random.Random(0))
    'At the back of the ego car, can you see moving cars?'
    """
    stem, options, listed = question.partition(OPTIONS)
    for pattern, templates in _COMPILED:
        found = pattern.fullmatch(stem)
        if found:
            return (
                _written(rng.choice(templates), found, rng) + (_drawn(_OTHER_OPTIONS, rng) if options else "") + listed
            )
    return question


def _written(template: str, found: re.Match[str], rng: random.Random) -> str:
    """A template with its parts drawn, then its groups and place filled in."""
    text = _drawn(template, rng)
    if "lace}" in text:  # the sector is the last group
        place = _place(found.groups()[-1], rng)
        text = text.replace("{place}", place).replace("{Place}", place[0].upper() + place[1:])
    text = re.sub(r"\\(\d)", lambda number: found[int(number[1])], text)
    return f"{text[:-1]}{'?' if _ASKS.match(text) else '.'}" if text[-1] in "?." else text


_ASKS = re.compile(r"(?!(?:Tell|Give|List|Say) ?)")


def _place(sector: str, rng: random.Random) -> str:
    places = (*_PLACES, _SHORT[sector]) if sector in _SHORT else _PLACES
    return _drawn(rng.choice(places), rng).format(sector=sector)


def _drawn(template: str, rng: random.Random) -> str:
    """`[a|b]` → one of its parts; parts may hold others, which are drawn first."""
    while (drawn := re.sub(r"\[([^\[\]]*)\]", lambda parts: rng.choice(parts[1].split("|")), template)) != template:
        template = drawn
    return template
