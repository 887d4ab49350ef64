"""burnish: fine-tune chat models on Ray, exactly.

recipe       = load("jobs/recipes/x.yaml", ["lora.rank=16"])     config.py
rows         = read(slice)                                       data/sources.py
conversation = Conversation.parse(row)                           data/conversation.py
samples      = render(conversation, template)                    data/template.py
packs        = pack(samples, capacity)                           data/packing.py
batches      = stream(...)                                       data/pipeline.py
metrics      = train_step(worker, batch, step)                   train/loop.py
               writer.write(progress, metrics, files)            train/writer.py
               tracker.log(metrics, step)                        tracking.py
               export(run, folder)                               export.py
"""

from burnish.config import Recipe, load
from burnish.errors import BurnishError

__version__ = "0.1.0"
__all__ = ["BurnishError", "Recipe", "__version__", "load"]
