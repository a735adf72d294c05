"""DriveLM's questions in other words that keep every answer right."""

import re

_OPTIONS = " Please select the correct answer from the following options:"
_OPTIONS_REWRITTEN = " Which of the following options is correct? Answer with its letter. The following options:"
_TAG = r"(<c\d+,[^>]*>)"
# DriveLM's wordings and others for them. Each answer stays right: only words that carry no information change.
PARAPHRASES = (
    (r"Are there (.+) to the (.+) of the ego car\?", r"Can any \1 be seen to the \2 of the ego vehicle?"),
    (r"What are objects to the (.+) of the ego car\?", r"Name the objects to the \1 of the ego vehicle."),
    (r"How many (.+) are there to the (.+) of the ego car\?", r"Count the \1 to the \2 of the ego vehicle."),
    (
        r"What is the closest object to the (.+) of the ego car\?",
        r"Which object to the \1 of the ego vehicle is nearest to it?",
    ),
    (
        r"What is the status of the (.+) that (is|are) to the (.+) of the ego car\?",
        r"The \1 to the \3 of the ego vehicle: what \2 their status?",
    ),
    (r"Is there any traffic element in the (.+) view\?", r"Can any traffic element be seen in the \1 view?"),
    (rf"What is the visual description of {_TAG}\?", r"Describe what \1 looks like."),
    (rf"What is the observed status of object {_TAG}\?", r"Which status does object \1 have?"),
    (rf"What is the moving status of object {_TAG}\?", r"How does object \1 move?"),
    (rf"What is the future state of {_TAG}\?", r"Which state will \1 be in next?"),
    (
        rf"Is {_TAG} an object that the ego vehicle should consider in the current scene\?",
        r"Should the ego vehicle consider \1 in the current scene?",
    ),
    (
        rf"Is it necessary for the ego vehicle to take {_TAG} into account\?",
        r"Does the ego vehicle have to take \1 into account?",
    ),
    (
        rf"Would {_TAG} be in the moving direction of the ego vehicle\?",
        r"Is \1 going to be in the direction in which the ego vehicle moves?",
    ),
    (rf"Is {_TAG} a traffic sign or a road barrier\?", r"Would you call \1 a traffic sign or a road barrier?"),
    (r"What is the target action of the ego vehicle\?", r"Which action does the ego vehicle aim at?"),
    (
        r"In this scenario, what are (safe|dangerous) actions to take for the ego vehicle\?",
        r"Which actions of the ego vehicle would be \1 in this scenario?",
    ),
    (
        r"What is the traffic signal that the ego vehicle should pay attention to\?",
        r"To which traffic signal should the ego vehicle pay attention?",
    ),
    (r"Predict the behavior of the ego vehicle\.", r"How will the ego vehicle behave?"),
)


def paraphrase(question: str) -> str | None:
    """The question in other words with the same answer, or None where there is no rule for it.

    >>> paraphrase("Are there moving cars to the back of the ego car?")
    'Can any moving cars be seen to the back of the ego vehicle?'
    """
    stem, options, listed = question.partition(_OPTIONS)
    for pattern, replacement in PARAPHRASES:
        if re.fullmatch(pattern, stem):
            rewritten = re.sub(pattern, replacement, stem)
            if " their status?" in rewritten and " is their" in rewritten:
                rewritten = rewritten.replace(" is their", " is its")
            return rewritten + (_OPTIONS_REWRITTEN + listed if options else "")
    return None
