"Text towers by the names of the hub, from a filled cache and without a network"
import os
import subprocess
import sys

SCRIPT = """
import shutil
from pathlib import Path
import torch, transformers
from medclip_nb.core import InputError
from medclip_nb.datasets import token_lengths
from medclip_nb.models import load_model, save_checkpoint, swap_towers

home = Path(r'{home}')
repo = home/'hub'/'models--org--tiny'
snapshot = repo/'snapshots'/('a' * 40)
snapshot.mkdir(parents=True), (repo/'refs').mkdir()
(repo/'refs'/'main').write_text('a' * 40)
words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'lesion', 'no', 'left', 'right']
(snapshot/'vocab.txt').write_text('\\n'.join(words))
transformers.BertTokenizerFast(str(snapshot/'vocab.txt')).save_pretrained(snapshot)
(snapshot/'vocab.txt').unlink()
sizes = dict(vocab_size=10, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=48, max_position_embeddings=64)
text = transformers.BertModel(transformers.BertConfig(**sizes))
text.save_pretrained(snapshot)

clip = swap_towers('timm:resnet10t', 'hf:org/tiny', dim=32, device='cpu')
loaded = clip.model.text.transformer
assert torch.equal(loaded.embeddings.word_embeddings.weight, text.embeddings.word_embeddings.weight)
assert (clip.untrained, clip.parts) == (False, ['text tower org/tiny'])
texts = ['a lesion', 'no lesion left', 'a left']
assert clip.encode_texts([]).shape == clip.encode_images([]).shape == (0, 32)
spaced = ['a lesion &amp; no lesion']
cleaned, clip.tokenizer.clean_fn = clip.tokenizer.clean_fn, lambda text: text.split(' &')[0]
assert clip.token_counts(spaced) == token_lengths(spaced, clip.tokenizer).tolist() == [4]
clip.tokenizer.clean_fn = cleaned
features = clip.encode_texts(texts)
assert clip.tokenizer(texts)[1, :5].tolist() == [2, 7, 6, 8, 3]
folder = save_checkpoint(clip, home/'saved')
shutil.rmtree(repo)
assert torch.equal(load_model(str(folder), device='cpu').encode_texts(texts), features)
try: swap_towers('timm:resnet10t', 'hf:org/tiny', device='cpu')
except InputError as error: assert 'hf:org/tiny' in str(error)
else: raise AssertionError('found without its files')
"""


def test_a_text_tower_by_its_hub_name_brings_its_tokenizer(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(home=tmp_path)], capture_output=True, text=True,
                          env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
