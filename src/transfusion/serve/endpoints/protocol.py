"""What clients send, as this server's model and limits allow it. What is not listed is refused by its name.

Names follow OpenAI's API where it has them, and elsewhere vLLM-Omni's, which others share. The native request has the
names of `Pipeline.stream`. Sizes are WIDTHxHEIGHT, as OpenAI writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    create_model,
    model_validator,
)

from transfusion.config import Config
from transfusion.config.objectives import SAMPLERS
from transfusion.generate.settings import AnswerSettings, ImageSettings
from transfusion.sequence.sizes import IMAGE, Size
from transfusion.serve.endpoints.media import OutputFormat, size_name, size_of
from transfusion.serve.limits import MAX_PARTIAL_IMAGES, Limits
from transfusion.tokens import MAX_SAMPLING_SEED

Text = Annotated[str, StringConstraints(strict=True)]
# Parts of a prompt, and messages of a chat.
MAX_PARTS = 1024

Seed = Annotated[int, Field(ge=0, le=MAX_SAMPLING_SEED)]
Share = Annotated[float, Field(ge=0, le=1)]
Body = TypeVar("Body", bound=BaseModel)
# By the name of a field: its narrower type, with bounds and a default.
Allowed = Mapping[str, tuple[Any, dict[str, Any]]]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class _Drawing(_Strict):
    """How images are drawn, so far as all endpoints name it alike."""

    size: str | None = Field(
        None, description="WIDTHxHEIGHT, one of the model's sizes. auto: the model's choice"
    )
    guidance_interval: tuple[Share, Share] = Field(
        (0.0, 1.0), description="shares of the timesteps between which guidance is applied. 1 is noise alone"
    )
    guidance_rescale: Share = Field(0.0, description="how far guidance keeps the contrast")
    negative_prompt: Text = Field("", description="what guidance leads away from. Empty: no caption")
    sampler: str = Field("auto", description="of the images")

    def _settings(self, sizes: list[Size], steps: int, guidance: float) -> ImageSettings:
        return {
            "size": size_of(self.size or "auto", sizes),
            "steps": steps,
            "guidance": guidance,
            "guidance_interval": self.guidance_interval,
            "guidance_rescale": self.guidance_rescale,
            "negative_prompt": self.negative_prompt,
            "sampler": self.sampler,
        }


class _ImageFields(_Drawing):
    """The same with the names of OpenAI's and vLLM-Omni's endpoints."""

    num_inference_steps: int = Field(25, description="sampler steps of an image")
    guidance_scale: float = Field(3.0, description="scale of classifier-free guidance. 1: none")

    def image_settings(self, sizes: list[Size]) -> ImageSettings:
        """As `Pipeline` takes them."""
        return self._settings(sizes, self.num_inference_steps, self.guidance_scale)


class _Ignored(_Strict):
    """What OpenAI's clients may send and no answer depends on."""

    user: Text | None = Field(None, description="not used")
    safety_identifier: Text | None = Field(None, description="not used")


class ImagesBody(_ImageFields, _Ignored):
    """POST /v1/images/generations."""

    prompt: Text = Field(description="what is to be drawn")
    model: Text | None = Field(None, description="the name of the model that is served")
    n: int = Field(1, ge=1, description="images, of seed, seed + 1 and so on")
    seed: Seed | None = Field(
        None, description="of the first image. None: a random one, which the answer tells"
    )
    stream: bool = Field(False, description="send events as images are made")
    partial_images: int = Field(
        0, ge=0, le=MAX_PARTIAL_IMAGES, description="previews of each image, with stream"
    )
    output_format: OutputFormat = Field("png", description="of the images. Only PNG carries the recipe")
    output_compression: int = Field(100, ge=0, le=100, description="quality of JPEG and WebP")
    response_format: Literal["b64_json"] | None = Field(None, description="images are in the answer itself")
    quality: Literal["auto", "standard"] | None = Field(None, description="not used; steps decide")
    background: Literal["auto", "opaque"] | None = Field(None, description="images are opaque")
    moderation: Literal["auto", "low"] | None = Field(None, description="not used")

    @model_validator(mode="after")
    def _streams_what_it_shows(self) -> ImagesBody:
        if self.partial_images and not self.stream:
            raise ValueError("partial_images needs stream=true")
        return self


class EditsBody(ImagesBody):
    """POST /v1/images/edits: a form, with its images as files under `image` or `image[]`."""

    prompt: Text = Field(description="what is to be changed")
    size: str | None = Field(
        None, description="WIDTHxHEIGHT, one of the model's sizes. None: that of the first image"
    )


class _Tolerant(BaseModel):
    """Parts of messages carry hints for other servers."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class TextPart(_Tolerant):
    """A text of a message."""

    type: Literal["text"]
    text: Text


class ImageUrl(_Tolerant):
    """An image of a message."""

    url: Text = Field(description="data:image/png;base64,... No other URL is fetched")


class ImagePart(_Tolerant):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(_Tolerant):
    """A sound of a message."""

    data: Text = Field(description="base64 of a WAV or FLAC file")
    format: Literal["wav", "flac"] = Field(description="of the file")


class AudioPart(_Tolerant):
    """A sound of a message."""

    type: Literal["input_audio"]
    input_audio: InputAudio


_SilentParts = Annotated[
    list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(max_length=MAX_PARTS)
]
Parts = Annotated[
    list[Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]],
    Field(max_length=MAX_PARTS),
]


class Message(_Tolerant):
    """A message of a chat. An answer may be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Parts | None = Field(None, description="a text, or texts and images in their order")
    parts: Parts | None = Field(
        None, description="of an answer: its texts and images in their order, in place of content and images"
    )
    images: Annotated[list[ImagePart], Field(max_length=MAX_PARTS)] | None = Field(
        None, description="of an answer without parts: images behind its content"
    )

    def all_parts(self) -> list[TextPart | ImagePart | AudioPart]:
        """Its texts, images and sounds in their order."""
        if self.parts is not None:
            return list(self.parts)
        content = self.content or []
        written = [TextPart(type="text", text=content)] if isinstance(content, str) else list(content)
        return [*written, *(self.images or [])]


class StreamOptions(_Strict):
    """Of a streamed chat."""

    include_usage: bool | None = Field(None, description="send usage in a last chunk")
    include_obfuscation: bool | None = Field(None, description="not used")


class TextFormat(_Strict):
    """The one format of answers."""

    type: Literal["text"]


class ImageConfig(_ImageFields):
    """Of the images of an answer."""


class ChatBody(_Ignored):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(
        min_length=1, max_length=MAX_PARTS, description="what was said, in its order"
    )
    model: Text | None = Field(None, description="the name of the model that is served")
    modalities: list[Literal["text", "image", "audio"]] = Field(
        ["text", "image"],
        min_length=1,
        max_length=3,
        description="what the answer may hold. image alone: one image follows at once",
    )
    image_config: ImageConfig = Field(ImageConfig(), description="how images are drawn")
    max_images: int = Field(4, ge=0, description="maximum of images")
    partial_images: int = Field(
        0, ge=0, le=MAX_PARTIAL_IMAGES, description="previews of each image, with stream"
    )
    max_tokens: int = Field(256, ge=1, description="maximum of text tokens")
    max_completion_tokens: int | None = Field(None, ge=1, description="the same, by its newer name")
    temperature: float = Field(0.0, ge=0, le=100, description="of the text. 0: the likeliest tokens")
    top_p: float = Field(1.0, gt=0, le=1, description="the likeliest tokens that together reach it")
    seed: Seed | None = Field(
        None, description="of the first answer. None: a random one, which the answer tells"
    )
    n: int = Field(1, ge=1, description="answers, of seed, seed + 1 and so on")
    stop: Text | list[Text] | None = Field(None, description="texts before which an answer ends, at most 4")
    stream: bool = Field(False, description="send the answer as it is made")
    stream_options: StreamOptions | None = Field(None, description="with stream")
    metadata: Annotated[dict[Text, Text], Field(max_length=16)] | None = Field(None, description="not used")
    store: bool | None = Field(None, description="not used; nothing is stored")
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="there are none")
    tool_choice: Literal["none", "auto"] | None = Field(None, description="there are no tools")
    response_format: TextFormat | None = Field(None, description="answers are text and images")
    logit_bias: Annotated[dict[Text, float], Field(max_length=0)] | None = Field(
        None, description="there is none"
    )
    top_logprobs: int | None = Field(None, ge=0, le=0, description="not told")
    reasoning_effort: Text | None = Field(None, description="not used")
    verbosity: Text | None = Field(None, description="not used")
    service_tier: Text | None = Field(None, description="not used")
    prompt_cache_key: Text | None = Field(None, description="not used; equal beginnings are shared anyway")
    parallel_tool_calls: bool | None = Field(None, description="not used")
    frequency_penalty: float | None = Field(None, ge=0, le=0, description="there is none")
    presence_penalty: float | None = Field(None, ge=0, le=0, description="there is none")
    logprobs: Annotated[bool, Field(json_schema_extra={"const": False})] | None = Field(
        None, description="not told"
    )

    @property
    def stops(self) -> list[str]:
        """Texts before which an answer ends."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @model_validator(mode="after")
    def _fits_together(self) -> ChatBody:
        if self.partial_images and not self.stream:
            raise ValueError("partial_images needs stream=true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        if self.logprobs:
            raise ValueError("logprobs are not told; leave it out")
        if len(self.stops) > 4 or not all(self.stops):
            raise ValueError("stop takes up to 4 texts, none of them empty")
        return self


class AudioOutput(_Tolerant):
    """Of the sounds of an answer."""

    format: Literal["wav"] = Field("wav", description="of the files")


class SoundingChatBody(ChatBody):
    """POST /v1/chat/completions of a model that has sounds."""

    audio: AudioOutput | None = Field(None, description="of the sounds of an answer. No voice can be chosen")


class PromptImage(_Strict):
    """An image of a native prompt."""

    image: Text = Field(description="data:image/png;base64,... No other URL is fetched")


class PromptMedia(_Strict):
    """A sound or an array of a native prompt."""

    media: Text = Field(
        description="data:audio/wav;base64,... of a WAV or FLAC file, data:application/octet-stream;base64,... of a"
        " NumPy file. No other URL is fetched"
    )
    modality: Text = Field(description="which of the model's modalities it is of")


Prompt = Text | Annotated[list[Text | PromptImage | PromptMedia], Field(max_length=MAX_PARTS)]


class InspectBody(_Strict):
    """POST /v1/inspect: a document as the model sees it."""

    document: Prompt = Field(description="a text, or texts and images, such as a prompt with its answer")


class GenerateBody(_Drawing):
    """POST /v1/generate: the names and the meaning of `Pipeline.stream`, with `draws` those of `Pipeline.sample`."""

    prompt: Prompt = Field(description="a text, or texts and images in their order")
    seed: Seed = Field(0, description="of the text and the first image")
    preview_every: int = Field(
        0, ge=0, description="calls of the model between previews of an image. 0: none"
    )
    draws: bool = Field(False, description="the answer is one image that follows the prompt at once")
    max_tokens: int = Field(256, ge=1, description="maximum of text tokens")
    max_images: int = Field(4, ge=0, description="maximum of images")
    temperature: float = Field(0.0, ge=0, le=100, description="of the text. 0: the likeliest tokens")
    top_p: float = Field(1.0, gt=0, le=1, description="the likeliest tokens that together reach it")
    guidance: float = Field(3.0, description="scale of classifier-free guidance. 1: none")
    steps: int = Field(25, description="sampler steps of an image")
    size: str = Field("auto", description="WIDTHxHEIGHT, one of the model's sizes. auto: the model's choice")

    @property
    def holds(self) -> list[str]:
        """What the answer may hold beside text. With `draws` it is one."""
        return [IMAGE]

    def image_settings(self, sizes: list[Size]) -> ImageSettings:
        """As `Pipeline` takes them."""
        return self._settings(sizes, self.steps, self.guidance)

    def answer_settings(self, sizes: list[Size]) -> AnswerSettings:
        """As `Pipeline` takes them."""
        return {
            **self.image_settings(sizes),
            "modalities": self.holds,
            "max_tokens": self.max_tokens,
            "max_images": self.max_images,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }


class MediaGenerateBody(GenerateBody):
    """POST /v1/generate of a model with further modalities. With `draws` the names are those of `image_request`."""

    modalities: list[Text] = Field(
        [IMAGE],
        min_length=1,
        description="what the answer may hold beside text. With draws one of them, which follows the prompt at once",
    )

    @property
    def holds(self) -> list[str]:
        """What the answer may hold beside text. With `draws` it is one."""
        return self.modalities

    @model_validator(mode="after")
    def _draws_one(self) -> MediaGenerateBody:
        if self.draws and len(self.modalities) > 1:
            raise ValueError("draws takes one of the modalities; name it alone")
        return self


@dataclass(frozen=True, slots=True)
class Protocol:
    """The bodies that one server takes, each field within what its model and limits allow."""

    images: type[ImagesBody]
    edits: type[EditsBody]
    chat: type[ChatBody]
    generate: type[GenerateBody]
    inspect: type[InspectBody]

    @property
    def with_nulls(self) -> tuple[type[BaseModel], ...]:
        """Those whose fields may be null wherever they may be left out."""
        return (self.images, self.chat)

    @property
    def bodies(self) -> list[type[BaseModel]]:
        """All of them."""
        return [self.images, self.edits, self.chat, self.generate, self.inspect]

    @classmethod
    def of(cls, config: Config, limits: Limits) -> Protocol:
        """Of a model and limits."""
        sizes = [size_name(size) for size in config.codec.sizes]
        samplers = ["auto", *SAMPLERS[config.diffusion.prediction]]
        steps = min(limits.steps, config.diffusion.steps)
        tokens = min(limits.tokens, config.data.sequence_length)
        # Without dropped captions in training there is nothing that guidance could lead away from.
        guided = config.data.caption_dropout > 0
        guidance = {"ge": 0.0, "le": 100.0} if guided else {"ge": 1.0, "le": 1.0}
        default = 3.0 if guided else 1.0
        allowed: Allowed = {
            "size": (Literal[("auto", *sizes)], {}),
            "sampler": (Literal[tuple(samplers)], {}),
            "num_inference_steps": (int, {"ge": 1, "le": steps, "default": min(25, steps)}),
            "steps": (int, {"ge": 1, "le": steps, "default": min(25, steps)}),
            "guidance_scale": (float, {**guidance, "default": default}),
            "guidance": (float, {**guidance, "default": default}),
            "n": (int, {"ge": 1, "le": min(limits.images, limits.answers)}),
            "max_images": (int, {"ge": 0, "le": limits.images, "default": min(4, limits.images)}),
            "max_tokens": (int, {"ge": 1, "le": tokens, "default": min(256, tokens)}),
            "max_completion_tokens": (int, {"ge": 1, "le": tokens}),
        }
        image_config = _narrowed(ImageConfig, allowed)
        of_chat: Allowed = {**allowed, "image_config": (image_config, {"default": image_config()})}
        prompt = _prompt(config)
        return cls(
            _narrowed(ImagesBody, allowed),
            _narrowed(EditsBody, allowed),
            _chat(config, of_chat),
            _generate(config, {**allowed, "prompt": (prompt, {})}),
            _narrowed(InspectBody, {"document": (prompt, {})}),
        )


def _chat(config: Config, allowed: Allowed) -> type[ChatBody]:
    """With sounds where the model has some."""
    if any(each.kind == "mel" for each in config.modalities):
        return _narrowed(SoundingChatBody, allowed, ChatBody.__name__)
    message = _narrowed(Message, {"content": (Text | _SilentParts, {}), "parts": (_SilentParts, {})})
    silent: Allowed = {
        "messages": (list[message], {"min_length": 1, "max_length": MAX_PARTS}),  # type: ignore[valid-type]
        "modalities": (list[Literal["text", "image"]], {"min_length": 1, "max_length": 2}),
    }
    return _narrowed(ChatBody, {**allowed, **silent})


def _generate(config: Config, allowed: Allowed) -> type[GenerateBody]:
    """With further modalities where the model has some."""
    others = config.modalities
    if not others:
        return _narrowed(GenerateBody, allowed)
    names = (IMAGE, *(each.name for each in others))
    sizes = [size_name(size) for size in config.media_sizes.all]
    objectives = (config.diffusion, *(each.diffusion for each in others))
    samplers = [sampler for each in objectives for sampler in SAMPLERS[each.prediction]]
    more: Allowed = {
        "modalities": (list[Literal[names]], {"min_length": 1}),  # type: ignore[valid-type]
        "size": (Literal[("auto", *dict.fromkeys(sizes))], {}),
        "sampler": (Literal[("auto", *dict.fromkeys(samplers))], {}),
    }
    return _narrowed(MediaGenerateBody, {**allowed, **more}, GenerateBody.__name__)


def _prompt(config: Config) -> Any:
    """A text or its parts. Each is checked as what it seems to be, so that an error has its names."""
    if not config.modalities:
        return Text | Annotated[list[Text | PromptImage], Field(max_length=MAX_PARTS)]
    names = tuple(each.name for each in config.modalities)
    media = _narrowed(PromptMedia, {"modality": (Literal[names], {})})
    part = (
        Annotated[Text, Tag("a text")]
        | Annotated[PromptImage, Tag("an image")]
        | Annotated[media, Tag("more")]  # type: ignore[valid-type]
    )
    parts = list[Annotated[part, Discriminator(_seeming)]]
    return Text | Annotated[parts, Field(max_length=MAX_PARTS)]


def _seeming(part: Any) -> str:
    if isinstance(part, str):
        return "a text"
    return "more" if isinstance(part, dict) and "media" in part else "an image"


def _narrowed(model: type[Body], allowed: Allowed, name: str = "") -> type[Body]:
    """The model with fields of narrower types, by its own name or another. A field that may be None still may."""
    fields: dict[str, Any] = {}
    for field_name, (kind, changes) in allowed.items():
        field = model.model_fields.get(field_name)
        if field is None:
            continue
        bounds = {key: value for key, value in changes.items() if key != "default"}
        narrow = Annotated[kind, Field(**bounds)] if bounds else kind
        default = changes.get("default", field.default)
        if field.default is None:
            narrow, default = narrow | None, None
        fields[field_name] = (narrow, Field(default, description=field.description))
    return create_model(name or model.__name__, __base__=model, __doc__=model.__doc__, **fields)
