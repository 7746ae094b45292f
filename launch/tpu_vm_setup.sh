#!/usr/bin/env bash
# Prepare one TPU VM, in the repository's folder: Python 3.12, the package, and a bucket if one is named:
#
#   launch/tpu_vm_setup.sh [BUCKET]
#
# The images of TPU VMs have Python 3.10, which is too old; uv brings another. BUCKET is mounted at
# bucket/. Running it again changes nothing that is there.
set -euo pipefail

export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[[ -d .venv ]] || uv venv --python 3.12
uv pip install --quiet -e '.[tpu]'

bucket=${1:-}
if [[ -n $bucket ]]; then
  if ! command -v gcsfuse >/dev/null; then
    key=/usr/share/keyrings/cloud.google.asc
    curl -sSf https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee $key >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get -qq update
    sudo apt-get -qq install -y gcsfuse
  fi
  mkdir -p bucket
  # All hosts write to one checkpoint: none may go by what it remembers of the bucket's folders.
  mountpoint -q bucket || gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 "$bucket" "$PWD/bucket"
fi
