/** Two deep-zoom viewers of one image, before and after, that always show the same place at the same size. */

import OpenSeadragon from "openseadragon";
import { type Picture, picture } from "./data";

const OWN_KEYS = /^([a-z]|[A-Z])$/; // letters are the page's, not the viewer's

function source(place: Picture): object {
  if (!place.tile) return { type: "image", url: picture(place.file), buildPyramid: true };
  return {
    Image: {
      xmlns: "http://schemas.microsoft.com/deepzoom/2008",
      Url: `${picture(place.file)}/`,
      Format: "jpg",
      Overlap: "1",
      TileSize: String(place.tile),
      Size: { Width: String(place.width), Height: String(place.height) },
    },
  };
}

function open(element: HTMLElement, place: Picture, label: string): OpenSeadragon.Viewer {
  const viewer = OpenSeadragon({
    element,
    tileSources: [source(place)] as never,
    drawer: "canvas", // WebGL refuses pictures of a page that was opened from a disk
    showNavigationControl: false,
    animationTime: 0.5,
    springStiffness: 10,
    visibilityRatio: 0.4,
    viewportMargins: { left: 20, top: 20, right: 20, bottom: 20 },
    minZoomImageRatio: 0.02,
    maxZoomPixelRatio: 16,
    gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
    gestureSettingsTouch: { clickToZoom: false, dblClickToZoom: true },
  });
  viewer.canvas.setAttribute("role", "application");
  viewer.canvas.setAttribute("aria-label", `${label}; arrow keys move the image, plus and minus zoom`);
  viewer.addHandler("canvas-key", (event) => {
    const key = (event.originalEvent as KeyboardEvent).key;
    event.preventDefaultAction = OWN_KEYS.test(key);
  });
  return viewer;
}

export class Comparison {
  private readonly viewers: [OpenSeadragon.Viewer, OpenSeadragon.Viewer];
  private leader: OpenSeadragon.Viewer;
  private overlay: OpenSeadragon.TiledImage | null = null;
  private asked = 0;

  /** `onZoom` is told how many pixels of the screen show one of the restored image. */
  constructor(
    private readonly elements: [before: HTMLElement, after: HTMLElement],
    before: Picture,
    after: Picture,
    private readonly onZoom: (scale: number) => void,
  ) {
    this.viewers = [open(elements[0], before, "Before restoration"), open(elements[1], after, "Restored")];
    this.leader = this.viewers[1];
    this.viewers.forEach((viewer, number) => {
      const lead = () => (this.leader = viewer);
      for (const kind of ["pointerdown", "wheel", "touchstart", "focusin"]) {
        this.elements[number]!.addEventListener(kind, lead, { capture: true, passive: true });
      }
      viewer.addHandler("viewport-change", () => this.follow(viewer));
      viewer.addHandler("open", () => this.follow(this.leader));
      viewer.addHandler("resize", () => requestAnimationFrame(() => this.follow(this.leader)));
    });
  }

  zoomBy(factor: number): void {
    this.lead().zoomBy(factor).applyConstraints();
  }

  fit(): void {
    this.lead().goHome();
  }

  /** One pixel of the restored image on one pixel of the screen. */
  oneToOne(): void {
    const image = this.viewers[1].world.getItemAt(0);
    if (image) this.lead().zoomTo(image.imageToViewportZoom(1) / devicePixelRatio).applyConstraints();
  }

  /** Lay a picture over the restored image; null: none. */
  lay(file: string | null, opacity: number): void {
    const asked = ++this.asked;
    const viewer = this.viewers[1];
    if (this.overlay) viewer.world.removeItem(this.overlay);
    this.overlay = null;
    if (file === null) return;
    if (!viewer.isOpen()) {
      viewer.addOnceHandler("open", () => {
        if (asked === this.asked) this.lay(file, opacity);
      });
      return;
    }
    viewer.addTiledImage({
      tileSource: { type: "image", url: picture(file), buildPyramid: true } as never,
      width: 1,
      opacity,
      success: (event) => {
        const { item } = event as unknown as { item: OpenSeadragon.TiledImage };
        if (asked === this.asked) this.overlay = item;
        else viewer.world.removeItem(item);
      },
    });
  }

  fade(opacity: number): void {
    this.overlay?.setOpacity(opacity);
  }

  close(): void {
    for (const viewer of this.viewers) viewer.destroy();
  }

  private lead(): OpenSeadragon.Viewport {
    this.leader = this.viewers[1];
    return this.leader.viewport;
  }

  /** Show in the other viewer what `viewer` shows now. */
  private follow(viewer: OpenSeadragon.Viewer): void {
    if (viewer !== this.leader || !viewer.viewport) return;
    const other = this.viewers[viewer === this.viewers[0] ? 1 : 0];
    if (other.viewport && other.isOpen()) {
      other.viewport.zoomTo(viewer.viewport.getZoom(true), undefined, true);
      other.viewport.panTo(viewer.viewport.getCenter(true), true);
    }
    const image = this.viewers[1].world?.getItemAt(0);
    if (image) this.onZoom(image.viewportToImageZoom(viewer.viewport.getZoom(true)) * devicePixelRatio);
  }
}
