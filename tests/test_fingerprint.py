"""A fingerprint differs for everything that a pipeline's pictures depend on, and for nothing else."""

from diffusers import StableDiffusionXLPipeline

from atedm.app.fingerprint import fingerprint


def test_a_fingerprint_sees_every_part(model):
    pipe = StableDiffusionXLPipeline.from_pretrained(model)
    found = [fingerprint(pipe)]
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        *_, last = part.parameters()
        last.data.view(-1)[-1] += 1
        found.append(fingerprint(pipe))
    for name, value in {"padding_side": "left", "truncation_side": "left", "pad_token": "star"}.items():
        assert getattr(pipe.tokenizer_2, name) != value
        setattr(pipe.tokenizer_2, name, value)
        found.append(fingerprint(pipe))
    pipe.watermark = object()  # with the package for it, diffusers marks each picture
    found.append(fingerprint(pipe))
    assert len(set(found)) == len(found)


def test_a_model_that_has_drawn_is_the_same_model(model):
    pipe = StableDiffusionXLPipeline.from_pretrained(model)
    before = fingerprint(pipe)
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        tokenizer("a star", padding="max_length", truncation=True, max_length=9)  # as a pipeline calls it
    assert fingerprint(pipe) == before
