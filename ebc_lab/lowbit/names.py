"""What an unknown name is answered with: the nearest known one, or what to write here in place of a name of
the "1.58-bit hybrid" trainer."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

# other programs' names of fields: from a value to the fields that it stands for
Spellings: TypeAlias = Mapping[str, Callable[[Any], dict[str, Any]]]

_INSTEAD = {  # what to write: for which names of its modules, methods, settings and results
    "quantize(values, 'five', scale=0.5).values() has its values; quantize_model trains through such": (
        "Quantizer158Bit GPUQuantizer CPPQuantizer CQuantizer quantize_weights"
    ),
    "quantize(values, levels, group='row') has a step for every row": "AdaptiveQuantizer",
    "GradientQuantizer(levels).compress(gradients, step)": "quantize_gradients",
    "packed_size(n, levels) counts the bytes of n codes, inspect_packed(path) those of a file": (
        "estimate_model_size_reduction get_model_bit_compression_ratio compute_shared_model_size "
        "QuantizationExportAnalyzer"
    ),
    "quantize_model(model, 'ternary') has your torch model train in few levels, save_packed writes it": (
        "QuantConfig HybridTransformerWrapper HybridQuantizedLinear QuantizationAwareTrainer "
        "QuantizationHook AdaptiveBitAllocator quantize_model_weights SharedParameterQuantizer"
    ),
    "make_policy('auxnn', seed).factors(step, Observed(...)) of ebc_lab.lowbit.policy says both factors": (
        "AuxiliaryNN TrainingState predict_learning_rate predict_trust_region create_training_state "
        "predict_update_direction_bias"
    ),
    "feedback(gradient) takes the loss's derivative by ln of the factor": "update_with_feedback",
    "HybridLLMTrainer(TrainingConfig(use_adaptive_lr=True)) has Adam, a policy and a trust region": (
        "AdaptiveOptimizer AdaptiveConstrainedOptimizer select_optimizer"
    ),
    "attach(model, optimizer, target_kl=math.inf, radius=0.01) of ebc_lab.ebc bounds any optimizer's steps": (
        "ConstrainedOptimizationStep ConstrainedUpdateInfo CPPOptimizationStep CConstraintOperator"
    ),
    "available_backends() says which work here, and why others do not": (
        "_HAS_CPP _HAS_C get_gpu_info get_backend_info GPUTrainingBackend CPPHybridOptimizer CHybridOptimizer"
    ),
    "quantize and kmeans of HybridDispatcher measure and choose; get_metrics()['choices'] says whom": (
        "AdaptiveDispatcher BackendMetrics select_quantizer select_kmeans update_thresholds "
        "recommend_compilation"
    ),
    "kmeans(X, k, backend=...) runs on numpy, c, cpp, torch or cuda": "GPUKMeans CPPKMeans",
    "torch.matmul; no matrix product is made here": "GPUMatrixOps CMatrixOps benchmark_matrix_operations",
    "fit(data), then labels_, cluster_centers_, inertia_ and n_iter_": (
        "labels centroids inertia converged ClusterInfo get_cluster_info get_centroids"
    ),
    "fit(data), then labels, sizes and rows(step, batch_size, 'stratified')": (
        "cluster_embeddings get_balanced_clusters suggest_mini_batch_strategy cluster_assignments"
    ),
    "groups({name: tensor}) groups a model's tensors; quantize(w, group='row') gives a row its own step": (
        "cluster_layer_parameters cluster_parameters suggest_quantization_precision get_cluster_importance"
    ),
    "PerformanceBenchmark().run_all_benchmarks()": "benchmark_all_backends generate_report",
    "PerformanceBenchmark({'kmeans': []}).run_all_benchmarks()": "benchmark_quantization",
    "PerformanceBenchmark({'sizes': []}).run_all_benchmarks()": "benchmark_kmeans",
    "sizes": "quantization_sizes",
    "kmeans, of [points, features, clusters]": "kmeans_configs",
    "get_training_summary(), a dict": "metrics TrainingMetrics",
    "the key final_loss": "loss",
    "the key total_loss_reduction": "loss_reduction_rate",
    "the key constraints_active_share": "constraint_activation_rate",
    "model, whose parameters are the latent weights, or quantized_weights()": "parameters",
    "train(training_data, training_targets)": "train_step compute_batch_gradients prepare_training_data",
    "leave it out: no training depended on it": (
        "parameter_clusters auxiliary_nn_hidden_size initial_trust_radius"
    ),
    "leave it out: a step is the mean magnitude of its weights": "quantizer_scale",
    "leave it out: the passes end when no label changes": "tol",
    "use_adaptive_lr, which has both": "use_auxiliary_nn use_trust_region",
    "leave it out: an epoch is a record of metrics_history, and eval_fn is called after each": (
        "log_interval eval_interval"
    ),
    "HybridLLMTrainer(config, model=...) trains any torch model, one of transformers for instance": (
        "create_model DeepTransformerLLM DeepRNNLM TransformerConfig"
    ),
    "torch's DistributedDataParallel around the model, or `ebc-lab train launcher.processes_per_run=2`": (
        "DistributedTrainer DistributedConfig DistributedModel DistributedOptimizer"
    ),
    "share modules in the model itself, as tie_word_embeddings=True of transformers does": (
        "ParameterSharingConfig ParameterSharingManager LayerShareModel"
    ),
    "`ebc-lab autopilot study=lowbit` compares float, ternary and five on a text": (
        "LLMBenchmarkSuite compare_quantized_vs_baseline"
    ),
}
INSTEAD = {name: instead for instead, names in _INSTEAD.items() for name in names.split()}


def misnamed(names: Iterable[object], known: Iterable[str], owner: str, kind: str = "setting") -> str | None:
    """Return the sentence that refuses those of the names that are not known; None if all are."""
    known = list(known)
    wrong = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            wrong.append(f"{name!r} ({INSTEAD.get(str(name)) or f'did you mean {near!r}?'})")
    return f"{owner} has no {kind} {', '.join(wrong)}; there are {', '.join(known)}." if wrong else None


class Familiar:
    """A base of classes. A name that only other programs have is an error that says what to write instead."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            instead = f": {INSTEAD[name]}." if name in INSTEAD else "."
            raise AttributeError(f"{type(self).__name__} has no {name!r}{instead}", name=name, obj=self)


class Summary(Familiar, dict[str, Any]):
    """Figures by name. An unknown name is a KeyError that suggests the nearest."""

    def __missing__(self, name: object) -> Any:
        raise KeyError(misnamed([name], self, "this summary", "figure"))


class _Spelled(type):
    def __call__(cls, *values: Any, **settings: Any) -> Any:
        return super().__call__(*values, **cls.meant(settings))  # type: ignore[attr-defined]


class Settings(Familiar, metaclass=_Spelled):
    """A base of dataclasses. An unknown field, given or assigned, is a TypeError that names the nearest."""

    SPELLINGS: ClassVar[Spellings] = {}

    @classmethod
    def meant(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the settings by the names of the fields."""
        fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        if wrong := misnamed((s for s in settings if s not in cls.SPELLINGS), fields, cls.__name__):
            raise TypeError(wrong)
        found: dict[str, Any] = {}
        for name, value in settings.items():
            of_name = cls.SPELLINGS[name](value) if name in cls.SPELLINGS else {name: value}
            if twice := found.keys() & of_name:
                raise TypeError(f"{name} sets {min(twice)}, which is given too: leave one of them out.")
            found |= of_name
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        for field, its in self.meant({name: value}).items():
            super().__setattr__(field, its)
