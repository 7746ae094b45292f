// The image of a search: from a file to what the server takes.

// Larger images are made smaller before they are sent: the model sees no more of them.
const PIXELS = 2048 * 2048;
const BYTES = 8e6;
// Of base64 and the rest of the body.
const OVERHEAD = 0.7;
const AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp"];

/**
 * An image as it is sent and shown: {uri, shown, name}. Throws an Error with a sentence for the user.
 *
 * limits are the server's, {pixels, body_bytes}.
 */
export async function readImage(file, limits) {
  const shown = URL.createObjectURL(file);
  const image = new Image();
  image.src = shown;
  try {
    await image.decode();
  } catch {
    URL.revokeObjectURL(shown);
    throw new Error(`${file.name || "What was pasted"} is no image that this browser can read.`);
  }
  const pixels = Math.min(PIXELS, limits.pixels);
  const bytes = Math.min(BYTES, limits.body_bytes * OVERHEAD);
  const [width, height] = [image.naturalWidth || 512, image.naturalHeight || 512];
  let blob = file;
  if (width * height > pixels || file.size > bytes || !AS_THEY_ARE.includes(file.type)) {
    blob = await smaller(file, image, Math.min(1, Math.sqrt(pixels / (width * height))), bytes);
  }
  return { uri: await dataUri(blob), shown, name: file.name || "pasted image" };
}

async function smaller(file, image, scale, bytes) {
  // The server takes pixels as they are stored; an img is turned as the camera says.
  const source = await createImageBitmap(file, { imageOrientation: "none" }).catch(() => image);
  const canvas = document.createElement("canvas");
  for (; ; scale *= 0.7) {
    canvas.width = Math.max(1, Math.floor((source.width || 512) * scale));
    canvas.height = Math.max(1, Math.floor((source.height || 512) * scale));
    const context = canvas.getContext("2d");
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingQuality = "high";
    context.drawImage(source, 0, 0, canvas.width, canvas.height);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.9));
    if (blob && (blob.size <= bytes || canvas.width * canvas.height < 64)) return blob;
  }
}

function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The image cannot be read from the disk."));
    reader.readAsDataURL(blob);
  });
}

/** The first image file of a drop or a paste; any other file if there is no image; undefined without files. */
export function imageIn(transfer) {
  const files = [...(transfer?.files ?? [])];
  return files.find((file) => file.type.startsWith("image/")) ?? files[0];
}
