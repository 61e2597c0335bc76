"""The subjects: one class for each kind of model that looks at an image; `texts.py` has those that read a text alone.

Shapes: n images, C channels, H x W pixels, S source tokens, T rows of the writer, V vocabulary or labels.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.generate import Generated, generate
from vqa_scratch.generate.loop import Choose
from vqa_scratch.generate.processors import bar
from vqa_scratch.generation_options import GenerationOptions, end_ids
from vqa_scratch.models.blip2 import Blip2
from vqa_scratch.models.fuyu import Fuyu
from vqa_scratch.models.hf_config import ReleasedDecoder
from vqa_scratch.models.idefics import Idefics
from vqa_scratch.models.image_text import ImageTextModel
from vqa_scratch.models.llava import Llava
from vqa_scratch.models.vilt import ViLTClassifier
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.nn.connecting import Conditioning
from vqa_scratch.nn.decoding import Decoder
from vqa_scratch.nn.states import Places
from vqa_scratch.study.base import ImageSubject, Source, Subject, block_attentions, grid_source, image_source

Seen = Callable[[int, Tensor], None]  # a token of an answer, and the scores (V,) that it was chosen by


def question_source(encoder: nn.Module | None, labels: Sequence[str], special: Sequence[int]) -> Source:
    """The tokens of a question with their `labels`; `special` are the indices of separators."""
    return Source("text", tuple(labels), tuple(special), attentions=block_attentions("text", encoder))


def query_source(queries: nn.Module, number: int, name: str = "query") -> Source:
    """Learned queries that read the image, as a source; their taps begin with `name`."""
    labels = tuple(f"query {i + 1}" for i in range(number))
    return Source(name, labels, (), None, block_attentions(name, queries), "image")


class WritingSubject(Subject):
    """A subject whose answer is written token by token by a `language` model, after its prompt."""

    start: tuple[int, ...] = ()  # what the answer begins with

    def __init__(self, model: nn.Module, language: Decoder, prompt: list[int], max_new_tokens: int) -> None:
        self.model, self.language, self.head = model, language, language.direct_head
        self.prompt, self.max_new_tokens = prompt, max_new_tokens
        self.decide_by({"eos_id": language.config.eos_id})

    def decide_by(self, own_options: dict[str, Any]) -> None:
        """Decode with these fields of `GenerationOptions`, those that the model knows, as whoever asks it does."""
        self.own_options, self.end_ids = own_options, end_ids(own_options["eos_id"])

    def begin_with(self, start: Sequence[int]) -> None:
        """The answer begins with these tokens, whatever the model would say. Raises UserError for one that is none."""
        size, longest = len(self.language.head), self.max_new_tokens
        if not all(type(token) is int and 0 <= token < size for token in start) or len(start) > longest:
            raise UserError(f"an answer begins with at most {longest} tokens from 0 to {size - 1}, not {list(start)}")
        self.start = tuple(start)

    @abstractmethod
    def conditioning(self, tokens: int) -> Conditioning:
        """What the language model reads besides its own tokens, of which there will be so many."""

    @torch.no_grad()
    def write(self, options: GenerationOptions, **how: Any) -> Generated:
        """The answer, in one row, by these options and further arguments of `generate`."""
        prompt = torch.tensor([self.prompt], device=self.device)
        return generate(self.language, prompt, None, self.conditioning(len(self.prompt)), options=options, **how)

    def generate(self, max_new_tokens: int | None = None, seen: Seen | None = None) -> list[int]:
        """As in `Subject`; `seen` is called with each token, as soon as it is known, and the scores (V,) behind it."""

        def beginning(choose: Choose) -> Choose:
            def chosen(scores: Tensor, live: Tensor, made: int) -> tuple[Tensor, Tensor | None]:
                token, scores_of = choose(scores, live, made)
                if made < len(self.start):
                    token = torch.full_like(token, self.start[made])
                if seen is not None and scores_of is not None:
                    seen(int(token), scores_of[0])
                return token, scores_of

            return chosen

        most = {"max_new_tokens": max_new_tokens or self.max_new_tokens}
        made = self.write(GenerationOptions(**self.own_options | most), choosing=beginning)
        return made.ids[0, : int(made.lengths[0])].tolist()

    def read(self, given: Conditioning, decoder_ids: list[int], rows: int = 1) -> Tensor:
        """(rows, T, V): the logits after so many copies of the tokens, with what is `given` to each."""
        ids = torch.tensor([decoder_ids], device=self.device).expand(rows, -1)
        return self.language.logits(self.language.hidden_after(given, self.language.embed(ids)))

    def logits(self, decoder_ids: list[int]) -> Tensor:
        return self.read(self.conditioning(len(decoder_ids)), decoder_ids)[0]

    def readout(self, states: Tensor) -> Tensor:
        return self.language.readout(states)

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """As in decoding: a token that never comes has none, and a temperature divides the logits."""
        logits = bar(logits, self.own_options.get("suppress_tokens", ()))
        return super().log_probabilities(logits / (self.own_options.get("temperature") or 1.0))


class ImageWriter(WritingSubject, ImageSubject):
    """A subject that writes about an image, `pixel_values` (1, C, H, W)."""

    def __init__(
        self, model: nn.Module, language: ReleasedDecoder, pixel_values: Tensor, prompt: list[int], max_new_tokens: int
    ) -> None:
        assert len(pixel_values) == 1
        super().__init__(model, language, prompt, max_new_tokens)
        self.decoder, self.pixel_values = language, pixel_values.to(self.device)

    @abstractmethod
    def given(self, images: Tensor, tokens: int) -> Conditioning:
        """As `conditioning`, of each of n images (n, C, H, W)."""

    def conditioning(self, tokens: int) -> Conditioning:
        return self.given(self.pixel_values, tokens)

    def logits_of(self, images: Tensor, decoder_ids: list[int]) -> Tensor:
        return self.read(self.given(images, len(decoder_ids)), decoder_ids, len(images))


class VQASubject(ImageWriter):
    """A model of encoder, connector and decoder with an image, and a question if it has a text encoder.

    pixel_values (1, C, H, W); `prompt` is what the decoder starts from, at least BOS; question_ids as the text encoder
    reads them, unpadded, with their `question_labels`; `special` are the indices of separators among them.
    """

    model: VQAModel

    def __init__(
        self,
        model: VQAModel,
        pixel_values: Tensor,
        prompt: list[int],
        question_ids: Sequence[int] = (),
        question_labels: Sequence[str] = (),
        special: Sequence[int] = (),
        max_new_tokens: int = 8,
    ) -> None:
        assert len(question_ids) == len(question_labels)
        super().__init__(model, model.decoder, pixel_values, prompt, max_new_tokens)
        grid = model.image.places(*pixel_values.shape[2:]).grid
        marks, queries = model.connector.marks(grid), model.connector.queries
        image = image_source(model.image, pixel_values, block_attentions("image", model.image), marks)
        self.mixing = model.connector.mixing(len(image) - len(marks), len(question_ids), grid)
        self.sources = (image, *((query_source(queries, len(self.mixing)),) if queries is not None else ()))
        self.input_ids = None
        if model.text is not None:
            self.input_ids = torch.tensor([list(question_ids)], device=self.device)
            self.sources += (question_source(model.text, question_labels, special),)
        self.prefix = 0 if model.connector.uses_memory else len(self.mixing)

    def given(self, images: Tensor, tokens: int) -> Conditioning:
        text = None
        if self.model.text is not None and self.input_ids is not None:
            ids = self.input_ids.expand(len(images), -1)
            text = self.model.text.states(ids, torch.ones_like(ids, dtype=torch.bool))
        return self.model.connector(self.model.image.states(images), text)


class Blip2Subject(ImageWriter):
    """A BLIP-2 with an image and a prompt: the states of its queries are the prefix of the language model.

    `prompt` are the ids that the language model starts from, at least its start token.
    """

    model: Blip2

    def __init__(self, model: Blip2, pixel_values: Tensor, prompt: list[int], max_new_tokens: int = 32) -> None:
        super().__init__(model, model.language, pixel_values, prompt, max_new_tokens)
        self.prefix = model.config.queries
        image = image_source(model.vision, pixel_values, block_attentions("image", model.vision))
        self.sources = (image, query_source(model.qformer, self.prefix))
        self.mixing = torch.eye(len(image) + self.prefix)[len(image) :]

    def given(self, images: Tensor, tokens: int) -> Conditioning:
        return Conditioning(prefix=self.model.encode_image(images))


class PlacedSubject(ImageWriter):
    """A LLaVA or a Fuyu with the `ids` of a prompt in which an image has places, anywhere but at its end.

    All of the prompt but its last token is the prefix of the decoder: words, and what an image becomes among them.
    `encode` makes its embeddings (n, N, E) of n images (n, C, H, W). The last tokens of the source `image` stand at
    the positions `where` of the prompt, in this order: as many as `where` has. `labels` are of all ids, `special` are
    the indices of separators among them.
    """

    model: ImageTextModel

    def __init__(
        self,
        model: ImageTextModel,
        pixel_values: Tensor,
        encode: Callable[[Tensor], Tensor],
        ids: list[int],
        labels: Sequence[str],
        special: Sequence[int],
        image: Source,
        where: Sequence[int],
        max_new_tokens: int = 32,
    ) -> None:
        assert len(ids) == len(labels) and max(where) < len(ids) - 1
        super().__init__(model, model.language, pixel_values, ids[-1:], max_new_tokens)
        self.encode, self.ids = encode, ids[:-1]
        self.prefix = len(self.ids)
        words = [i for i in range(self.prefix) if i not in set(where)]
        sinks = [place for place, i in enumerate(words) if i in special]
        self.sources = (question_source(None, [labels[i] for i in words], sinks), image)
        self.mixing = torch.zeros(self.prefix, len(words) + len(image))
        self.mixing[words, range(len(words))] = 1
        self.mixing[where, range(-len(where), 0)] = 1

    def given(self, images: Tensor, tokens: int) -> Conditioning:
        ids = torch.tensor([self.ids], device=self.device).expand(len(images), -1)
        return Conditioning(prefix=self.model.place(ids, self.encode(images)))


class IdeficsSubject(ImageWriter):
    """An Idefics with an image, which has its place, the token `place`, in the prompt.

    Gated layers before some of the blocks read the latents of the resampler, or the states of the encoder if there is
    none; tokens before the image read nothing.
    """

    model: Idefics

    def __init__(self, model: Idefics, pixel_values: Tensor, prompt: list[int], place: int, most: int = 32) -> None:
        super().__init__(model, model.language, pixel_values, prompt, most)
        self.place = place
        image = image_source(model.vision, pixel_values, block_attentions("image", model.vision))
        self.sources, self.mixing = (image,), torch.eye(len(image))
        if model.resampler is not None:
            latents = model.resampler.config.latents
            self.sources += (query_source(model.resampler, latents, "resampler"),)
            self.mixing = torch.eye(len(image) + latents)[len(image) :]

    def given(self, images: Tensor, tokens: int) -> Conditioning:
        seen = self.model.image_mask(torch.tensor([self.prompt], device=self.device), self.place, [1])
        seen = torch.cat([seen, seen[:, -1:].expand(-1, tokens - len(self.prompt), -1)], 1)
        states = self.model.encode_image(images[:, None])
        return Conditioning([self.model.memory(states, seen.expand(len(images), -1, -1))])


def llava_subject(
    model: Llava, pixel_values: Tensor, ids: list[int], labels: Sequence[str], special: Sequence[int], most: int
) -> PlacedSubject:
    """A LLaVA with a prompt whose image has its places; at most `most` new tokens. Other arguments as above."""
    image = image_source(model.vision, pixel_values, block_attentions("image", model.vision)[: model.blocks_read])
    where = [place for place, token in enumerate(ids) if token == model.config.image_token]
    return PlacedSubject(model, pixel_values, model.encode_image, ids, labels, special, image, where, most)


def fuyu_subject(
    model: Fuyu, pixel_values: Tensor, ids: list[int], labels: Sequence[str], special: Sequence[int], most: int
) -> PlacedSubject:
    """A Fuyu with a prompt that begins with the rows of its image; arguments as for `llava_subject`.

    The newlines between them are tokens of the image without a place.
    """
    side, columns = model.config.patch_size, pixel_values.shape[3] // model.config.patch_size
    places = Places((pixel_values.shape[2] // side, columns), side / 2, side)
    image = grid_source(places, [f"newline {row + 1}" for row in range(places.grid[0])])
    newlines = [columns + row * (columns + 1) for row in range(places.grid[0])]
    patches = [place for place in range(len(image)) if place not in newlines]

    def encode(images: Tensor) -> Tensor:
        return model.encode_image(model.patches(images))

    return PlacedSubject(model, pixel_values, encode, ids, labels, special, image, [*newlines, *patches], most)


class ViLTSubject(ImageSubject):
    """A ViLT with a question and an image in one stream: words, class token and patches.

    Arguments as for `VQASubject`; an answer is the index of a label. Its maps have one row: that of the first token,
    which the answer is read from, but in the plain map of weights the mean over the question's tokens.
    """

    writer = "encoder"

    def __init__(
        self,
        model: ViLTClassifier,
        pixel_values: Tensor,
        question_ids: list[int],
        question_labels: Sequence[str],
        special: Sequence[int],
    ) -> None:
        assert len(pixel_values) == 1 and len(question_ids) == len(question_labels)
        self.model: ViLTClassifier = model
        self.decoder, self.prompt, self.max_new_tokens = model.vilt.tower, question_ids[:1], 1
        self.pixel_values = pixel_values.to(self.device)
        self.input_ids = torch.tensor([question_ids], device=self.device)
        self.sources = (question_source(None, question_labels, special), image_source(model.vilt.tower, pixel_values))
        self.prefix = sum(map(len, self.sources))
        self.mixing = torch.eye(self.prefix)

    def rows(self, x: Tensor) -> Tensor:
        return x[..., :1, :]

    def readers(self, pattern: Tensor) -> Tensor:
        return pattern[..., self.where("text"), :].mean(-2, keepdim=True)

    def logits_of(self, images: Tensor, decoder_ids: list[int]) -> Tensor:
        return self.model(images, self.input_ids.expand(len(images), -1))[:, None]

    @torch.no_grad()
    def generate(self, max_new_tokens: int | None = None) -> list[int]:
        return [int(self.logits(self.prompt)[0].argmax())]

    def readout(self, states: Tensor) -> Tensor:
        pooled = torch.tanh(self.model.vilt.pooler(self.decoder.norm(states)))
        return self.model.out(F.gelu(self.model.norm(self.model.up(pooled))))

    def log_probabilities(self, logits: Tensor) -> Tensor:
        return F.logsigmoid(logits.float())  # each label has a probability of its own
