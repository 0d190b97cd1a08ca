ls photos
patchcache fit --images photos/ -k 256 --out codebook.safetensors
patchcache build --images photos/ --codebook codebook.safetensors --views 4 --out cache/
patchcache verify cache/ --retokenize 20
patchcache inspect cache/ --page cache.html
patchcache train beit_drop --cache cache/ --out run/ --set data.batch_size=64 --set optim.warmup_steps=10 --set run.steps=60 --set run.picture_every=60
patchcache probe run/
patchcache export run/ --out vit.safetensors
patchcache serve --codebook codebook.safetensors --port 8765 2> serve.log &
curl -s --retry 60 --retry-all-errors --retry-delay 1 -w '\n' http://127.0.0.1:8765/readyz
curl -s --data-binary @photos/bird/jay.jpg http://127.0.0.1:8765/v1/tokenize | cut -c -200
patchcache tokenize photos/bird --url http://127.0.0.1:8765 --out tokens.npz
kill %1
