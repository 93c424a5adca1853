"""Models of images and sounds are traced on inputs made from their configs alone, and lose FFN units."""

import pytest

import secateur
from secateur import criteria
from secateur.budget import Uniform
from secateur.check import verify
from secateur.pruning import prune
from secateur.select import Unit
from secateur.torch.data.example import FRAMES, example_for
from tests import zoo
from tests.tasks.media_data import WAV2VEC2

SPEECH = {**zoo.both_sides(1, 4, 48), "vocab_size": 50, "d_model": 32, "conv_channels": 16, "pad_token_id": 0}
SPEECH |= {"input_feat_per_channel": 8, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1}
BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 12}
BERT |= {"feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 7}
MODELS = {
    "HubertForSequenceClassification": WAV2VEC2,
    "WavLMForCTC": {**WAV2VEC2, "num_buckets": 8, "max_bucket_distance": 16},
    "Wav2Vec2BertForCTC": BERT,
    "Speech2TextForConditionalGeneration": SPEECH,
    "ResNetForImageClassification": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
}


@pytest.mark.parametrize("cls", MODELS)
def test_ffn_units_go_from_a_model_without_data(cls):
    model = zoo.random_model(cls, MODELS[cls])
    host = secateur.open(model)
    plan = prune(host, criteria.magnitude, Unit("ffn"), Uniform(0.5), None)
    assert plan.keep
    assert verify(host, plan, [example_for(model)]).difference < 1e-6


def test_a_sound_has_as_many_samples_as_its_frames_need():
    model = zoo.random_model("Wav2Vec2ForCTC", {**WAV2VEC2, "vocab_size": 12})
    assert model(**example_for(model)).logits.shape[1] == FRAMES


def test_an_encoder_of_an_encoder_decoder_gets_no_input_of_a_decoder():
    config = {**zoo.both_sides(1, 4, 48), "d_model": 32, "num_mel_bins": 8, "max_source_positions": 20}
    config |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0, "decoder_start_token_id": 1, "vocab_size": 50}
    model = zoo.random_model("WhisperForAudioClassification", config)
    assert set(example_for(model)) == {"input_features"}
