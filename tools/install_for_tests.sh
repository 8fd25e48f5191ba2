#!/bin/sh
# Installs Debian packages for tests: `install_for_tests.sh browser emulator`, where apt-get is there
# and asks nothing, that is, for root or with a sudo that needs no password. Elsewhere, or where that
# fails, it does nothing: the tests of what is missing are left out, and pytest's last lines say so.
packages=
unless() {
  command -v "$1" >/dev/null || packages="$packages $2"
}
for need in "$@"; do
  case $need in
    browser)
      unless chromium chromium
      unless chromedriver chromium-driver
      ;;
    emulator)
      unless aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
      unless qemu-aarch64 qemu-user
      unless wine wine
      ls /usr/lib/llvm-*/lib/libomp.so.5 >/dev/null 2>&1 || packages="$packages libomp5"
      ;;
    *)
      echo "$0: unknown need '$need': browser or emulator" >&2
      exit 2
      ;;
  esac
done
[ -n "$packages" ] && command -v apt-get >/dev/null || exit 0
as_root=
if [ "$(id -u)" -ne 0 ]; then
  as_root="sudo -n"
  $as_root true 2>/dev/null || exit 0
fi
echo "Installing Debian packages for tests:$packages"
apt() {
  $as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=30 "$@" >/dev/null
}
apt update
# One by one, as other systems than Debian have only some of them.
for package in $packages; do
  apt install -y --no-install-recommends "$package" || echo "$package cannot be installed" >&2
done
exit 0
