"""Define the options of a run that trains a VAE by a bound of its likelihood."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from latentvae.config.run_config import OptimizerConfig, RunConfig
from latentvae.data.data_config import DataConfig
from latentvae.losses.variational import VariationalConfig
from latentvae.models.dense.config import DenseVAEConfig
from latentvae.models.likelihood_models import AnyVAEConfig
from latentvae.option_marks import Elsewhere, MayChange, Positive
from latentvae.tasks.image_config import ImageJobConfig


class LikelihoodDataConfig(DataConfig):
    """Options of the images."""

    image_channels: int = Field(
        default=1,
        description=(
            "Number of image channels: 1 (grey), 3 (RGB) or 4 (RGBA). With 4, the network learns "
            "the transparency too."
        ),
    )
    binarize: Annotated[
        Literal["none", "dynamic", "static", "threshold"], Elsewhere("binarization")
    ] = Field(
        default="none",
        description=(
            "How grey pixels become black or white. `dynamic` draws each pixel anew in each "
            "update, with its grey value (0 to 1) as the probability of white. `static` draws each "
            "pixel in the same way, but only once for the whole training. `threshold` makes pixels "
            "above mid-grey white. `none` keeps grey values. With `dynamic`, the pixels of "
            "validation images are drawn only once. `--likelihood bernoulli` needs dynamic, static "
            "or threshold."
        ),
    )
    labels_per_class: int = Field(
        default=0,
        ge=0,
        description=(
            "Number of images of each class whose labels are used in training. The option `seed` "
            "decides which images keep their labels. All other images are used without labels. 0 "
            "keeps all labels. Images in a folder named `unlabelled` never have a label. This "
            "option is for networks that learn classes (architecture `classes`, as in the preset "
            "m2_mnist)."
        ),
    )
    perturb_rate: Annotated[float, Field(ge=0.0, le=1.0), Elsewhere("mutation_rate")] = Field(
        default=0.0,
        description=(
            "Fraction (0 to 1) of the pixel values in training that are replaced by random values. "
            "Use 0.1 to 0.3 to train a background model. To find anomalies, the log-likelihood "
            "under the background model is subtracted from the log-likelihood under a model that "
            "was trained without random values (`latentvae anomaly fit --correction ratio`). "
            "0 replaces no values."
        ),
    )
    cache_images: bool = Field(
        default=True,
        description=(
            "Read all images once, at the start, and keep them in memory as bytes. For small "
            "images, training is then much faster. This option works only with `--crop center`."
        ),
    )


class LikelihoodRunConfig(RunConfig):
    """Options of the training run: its length, batch size, precision, files and logs."""

    gradient_checkpointing: bool = Field(
        default=False,
        description=(
            "Recompute activations in the backward pass. This saves memory but takes more time."
        ),
    )
    validation_samples: Annotated[Positive, MayChange()] = Field(
        default=1,
        description=(
            "Number of latent samples for each image in a validation. More samples make the "
            "importance-weighted bound tighter."
        ),
    )
    num_sample_images: Annotated[Positive, MayChange()] = Field(
        default=64,
        description=(
            "Number of sampled images in each PNG that training writes to the folder `samples` "
            "in output_dir."
        ),
    )


class LikelihoodConfig(ImageJobConfig):
    """All options of a run that trains a variational autoencoder."""

    config: Annotated[str, MayChange()] = Field(
        default="vae_mnist",
        description=(
            "YAML file with options, or the name of a preset (a YAML file that comes with this "
            "package). Flags override the values in the file or preset."
        ),
    )
    vae: AnyVAEConfig = DenseVAEConfig()
    data: LikelihoodDataConfig = LikelihoodDataConfig()  # type: ignore[assignment]
    objective: VariationalConfig = VariationalConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: LikelihoodRunConfig = LikelihoodRunConfig()

    @property
    def bucket_multiple(self) -> int:
        return 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the images."""
        return (self.data.image_channels, *self.data.size)

    @model_validator(mode="after")
    def _check_together(self) -> "LikelihoodConfig":
        self.check_batch()
        self._check_images()
        if self.run.mixed_precision == "fp16":
            raise ValueError("mixed_precision fp16 is not supported. Set it to bf16 or no.")
        if self.run.gradient_checkpointing and not self.vae.can_checkpoint:
            raise ValueError(
                f"gradient_checkpointing is not available for architecture "
                f"{self.vae.architecture}. Leave it out."
            )
        self._check_classes()
        if self.objective.bound == "dreg" and (why := self.vae.why_no_single_gaussian()):
            raise ValueError(f"bound dreg needs {why}. Use bound iwae instead.")

        if self.objective.spectral_scale and not self.vae.has_convolutions:
            raise ValueError(
                f"spectral_scale {self.objective.spectral_scale:g} is for networks with "
                f"convolutions, but architecture {self.vae.architecture} has none. Leave it out."
            )
        if self.objective.tc_scale and (why := self.vae.why_no_single_gaussian()):
            raise ValueError(f"tc_scale needs {why}. Set tc_scale to 0.")
        if self.objective.tc_scale and self.run.train_batch_size < 4:
            raise ValueError(
                f"tc_scale needs a train_batch_size of at least 4 (got "
                f"{self.run.train_batch_size})."
            )
        return self

    def _check_classes(self) -> None:
        fields = VariationalConfig.model_fields
        changed = [n for n, f in fields.items() if getattr(self.objective, n) != f.default]
        own = {"label_scale", "class_floor", "label_warmup_steps"}
        for name in changed:
            if (name in own) != self.vae.has_classes and name not in ("bound", "train_samples"):
                raise ValueError(
                    f"{name} {getattr(self.objective, name)} has no effect with architecture "
                    f"{self.vae.architecture}. Leave it out."
                )

        if not self.vae.has_classes:
            if self.data.labels_per_class:
                raise ValueError(
                    f"labels_per_class {self.data.labels_per_class} needs architecture 'classes' "
                    f"(got {self.vae.architecture}). Give --config m2_mnist."
                )
            return
        if not self.data.cache_images:
            raise ValueError(
                "architecture 'classes' needs the images in memory. Give --cache_images."
            )
        if self.objective.bound != "elbo" or self.objective.train_samples > 1:
            raise ValueError(
                "architecture 'classes' needs bound elbo and train_samples 1 (got "
                f"{self.objective.bound} and {self.objective.train_samples})."
            )

    def _check_images(self) -> None:
        data = self.data
        if data.aspect_ratio_buckets:
            raise ValueError(
                f"aspect_ratio_buckets {data.aspect_ratio_buckets} gives images of several sizes, "
                "but the network needs one size. Leave it out."
            )
        if self.vae.likelihood == "bernoulli" and data.binarize == "none":
            raise ValueError(
                "--likelihood bernoulli is for binary images. Give --binarize dynamic, static or "
                "threshold, or another likelihood."
            )

        if data.binarize != "none" and self.vae.likelihood != "bernoulli":
            raise ValueError(
                f"binarize {data.binarize} needs likelihood bernoulli (got {self.vae.likelihood})."
            )
        if not data.cache_images:
            if data.binarize == "static":
                raise ValueError(
                    "--binarize static needs the images in memory. Give --cache_images."
                )
            return
        fixed = {"crop": "center", "crops_per_image": 1, "streaming": False}
        for name, value in fixed.items():
            if (given := getattr(data, name)) != value:
                raise ValueError(
                    f"{name} {given} does not work with cache_images. Give --no_cache_images, or "
                    f"{name} {value}."
                )
