"""The names of the files in a bundle."""

MANIFEST = "manifest.json"
VISION = "vision.onnx"
# One decoder graph per dialect. Both share one file of float weights, and each has its own copy of quantized weights.
DECODERS = {"standard": "decoder.onnx", "onnxruntime": "decoder.onnxruntime.onnx"}
# The optional int8 graph for long prompts, for ONNX Runtime on CPUs.
PROMPTS = "prompts.onnx"
EMBEDDINGS = "embeddings.bin"
TOKENIZER = "tokenizer.json"
# The `checkpoint.record.QuantizationRecord` of the checkpoint, if it has one.
QUANTIZATION = "quantization.json"
# Folders of TensorRT engines, `engines/NAME/`, and the files in each beside those that its record lists.
ENGINES = "engines"
ENGINE_RECORD = "engine.json"
RUNTIME_CACHES = {"decoder": "decoder.runtime.cache", "vision": "vision.runtime.cache"}
