"""What the demo's MLLM is trained on: prompts about pictures of toys, each with its answer."""

import random

from . import world

DESCRIBE = "describe the picture"


class Tasks:
    """An endless series of tasks on these one-toy pictures, each a function of split and number."""

    def __init__(self, pictures: list[world.Picture], split: str):
        self.pictures, self.split = pictures, split

    def __getitem__(self, number: int) -> tuple[list[int], str, str, str]:
        """(indices of pictures, prompt, answer, kind: "describe", "question", "ask" for a target, or "repeat")."""
        draw = random.Random(f"mllm {self.split} {number}")
        index = draw.randrange(len(self.pictures))
        picture = self.pictures[index]
        toy, share = picture.toys[0], draw.random()
        if share < 0.25:
            return [index], DESCRIBE, picture.caption(), "describe"
        if share < 0.45:
            return [index], *_question(draw, picture), "question"
        if share < 0.5:
            second = draw.randrange(len(self.pictures))
            references = [picture, self.pictures[second]]
            toys = (toy, references[1].toys[0])
            example = world.make_example(draw, references, toys, world.random_view(draw), "view")
            return [index, second], example.prompt, example.target.caption(), "ask"
        named = draw.choice(("view", "view", "turn", "turn", ""))
        bin = (picture.view.bin + draw.choice((2, 4, 6))) % 8 if named == "turn" else draw.randrange(8)
        view = world.random_view(draw, bin) if named else picture.view
        example = world.make_example(draw, [picture], (toy,), view, named)
        answer, prompt = example.target.caption(), example.prompt
        if share < 0.6:  # nothing more is known without the reference
            return [], prompt, prompt, "repeat"
        if named and not any(level in prompt for level in world.LEVELS):  # the height cannot be known
            answer = answer.rsplit(f" {view.level}", 1)[0]
        return [index], prompt, answer, "ask"


def _question(draw: random.Random, picture: world.Picture) -> tuple[str, str]:
    toy = picture.toys[0]
    answers = {f"what colour is its {part}?": getattr(toy, part) for part in world.PARTS}
    answers |= {"what is it?": f"a {toy.kind}", "from where is it seen?": picture.view.caption()}
    for turn, degrees in world.TURNS.items():
        answers[f"which side is seen {turn}?"] = f"the {world.VIEWS[(picture.view.bin + degrees // 45) % 8]}"
    prompt = draw.choice(tuple(answers))
    return prompt, answers[prompt]
