#!/usr/bin/env bash
# Makes a private CA, a server certificate and a client certificate, and secrets/ssl.config of them.
#
#   ./certificates.sh [FOLDER [HOST...]]
#
# FOLDER: default secrets. HOST: names and IP addresses by which clients reach the server, besides
# localhost and `serving`. CLIENT_VERIFY=true asks clients for a certificate. DAYS: how long they
# hold, default 365. An existing CA is kept: run it again to renew the other two.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
folder="${1:-secrets}"
shift || true
days="${DAYS:-365}"
umask 077

fail() {
  echo "certificates.sh: $1" >&2
  exit 1
}
quietly() { # what openssl says is of interest only when it fails
  local said
  said="$("$@" 2>&1)" || fail "$1 $2 failed: $said"
}

names="DNS:localhost,DNS:serving,IP:127.0.0.1"
for host in "$@"; do
  case "$host" in
    *[!A-Za-z0-9.:*-]* | "") fail "not a host. Received: '$host'. Expected a name or an IP address." ;;
    *:*) names="$names,IP:$host" ;;
    *[!0-9.]*) names="$names,DNS:$host" ;;
    *) names="$names,IP:$host" ;;
  esac
done
case "$days" in
  *[!0-9]* | "" | 0) fail "DAYS: not a number of days. Received: '$days'. Expected 1 or more." ;;
esac

mkdir -p "$folder"
if [ ! -e "$folder/ca.key" ] || [ ! -e "$folder/ca.crt" ]; then
  quietly openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 \
    -subj "/CN=keras-emr serving CA" -addext "keyUsage=critical,keyCertSign,cRLSign" \
    -keyout "$folder/ca.key" -out "$folder/ca.crt"
fi

certificate() { # NAME SUBJECT EXTENSIONS
  quietly openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$2" \
    -keyout "$folder/$1.key" -out "$folder/$1.csr"
  printf '%b\n' "basicConstraints=CA:FALSE\n$3" >"$folder/$1.ext"
  quietly openssl x509 -req -in "$folder/$1.csr" -CA "$folder/ca.crt" -CAkey "$folder/ca.key" \
    -CAcreateserial -days "$days" -extfile "$folder/$1.ext" -out "$folder/$1.crt"
  rm "$folder/$1.csr" "$folder/$1.ext"
}
certificate server serving "extendedKeyUsage=serverAuth\nsubjectAltName=$names"
certificate client keras-emr-client "extendedKeyUsage=clientAuth"

one_line() { awk '{printf "%s\\\\n", $0}' "$1"; }
sed -e "/^#/d" \
  -e "s|@SERVER_KEY@|$(one_line "$folder/server.key")|" \
  -e "s|@SERVER_CERT@|$(one_line "$folder/server.crt")|" \
  -e "s|@CUSTOM_CA@|$(one_line "$folder/ca.crt")|" \
  -e "s|@CLIENT_VERIFY@|${CLIENT_VERIFY:-false}|" \
  "$here/ssl.config.template" >"$folder/ssl.config.new"
mv "$folder/ssl.config.new" "$folder/ssl.config"
echo "$folder/ssl.config: for the server. $folder/ca.crt: for clients. $folder/ca.key: keep it apart."
