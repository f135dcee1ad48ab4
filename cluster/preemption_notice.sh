#!/usr/bin/env bash
# Drain this Ray node when the cloud is about to take its spot instance back:  preemption_notice.sh aws|gcp
#
# It asks the instance's metadata service until that gives notice (two minutes ahead on AWS, half a minute on GCP), tells
# Ray by when the node will be gone, and ends. Ray then places nothing new there. Start it in the background on every
# spot node once Ray is up, with RAY_ADDRESS set, and RAY_AUTH_MODE and the token where the cluster has one. METADATA is
# the address of the metadata service, POLL the seconds between two questions.
set -euo pipefail

cloud=${1:?give aws or gcp}
metadata=${METADATA:-http://169.254.169.254}

ask() { curl --silent --fail --max-time 2 "$@"; }

# Each sets in how many seconds the instance is gone, and fails as long as there is no notice.
notice_aws() {
    local token action time
    token=$(ask --request PUT --header "X-aws-ec2-metadata-token-ttl-seconds: 60" "$metadata/latest/api/token") || return 1
    action=$(ask --header "X-aws-ec2-metadata-token: $token" "$metadata/latest/meta-data/spot/instance-action") || return 1
    [[ $action =~ \"time\":\ *\"([^\"]+)\" ]] || return 1
    time=$(date --date "${BASH_REMATCH[1]}" +%s) || return 1
    remaining=$((time - $(date +%s)))
}

notice_gcp() {
    local preempted
    preempted=$(ask --header "Metadata-Flavor: Google" "$metadata/computeMetadata/v1/instance/preempted") || return 1
    [[ $preempted == TRUE ]] || return 1
    remaining=30
}

case $cloud in
    aws) poll=${POLL:-5} ;;
    gcp) poll=${POLL:-1} ;;
    *) echo "preemption_notice.sh: '$cloud' is not a cloud it knows; give aws or gcp" >&2 && exit 2 ;;
esac

until "notice_$cloud"; do
    sleep "$poll"
done
((remaining > 0)) || remaining=0
echo "$cloud takes this instance back in $remaining s: draining its Ray node"
exec ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "$cloud takes this instance back" \
    --deadline-remaining-seconds "$remaining"
