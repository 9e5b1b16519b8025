"""The pipelines; who imports one has registered all with diffusers."""

from diffad.registration import register

register()
