"""Common English words of five letters."""

from __future__ import annotations

_TEXT = """
about above actor acute admit adopt adult after again agent agree ahead alarm album alert alike
alive allow alone along alter amber amuse angel anger angle ankle apart apple apply arena argue
arise armor arrow aside asset audio avoid awake award aware bacon badge baker basic basil beach
beard beast begin being below bench berry birch birth black blade blame blank blast blaze blend
bless blind block bloom board boast bonus boost booth bound brain brake brand brave bread break
brick bride brief bring broad brook broom brown brush build bunch cabin cable camel canal candy
cargo carry carve catch cause cedar chain chair chalk charm chart chase cheap check cheek cheer
chess chest chief child chill choir chord chose civic claim clash clasp class clean clear clerk
cliff climb cloak clock close cloth cloud coach coast coral couch count court cover craft crane
crash cream creek crest crisp cross crowd crown crude crust cubic curve cycle daily dairy dance
dealt debut delay dense depth diary ditch dodge doubt dough draft drain drama dream dress drift
drill drink drive eager eagle early earth easel elbow elder elect empty enjoy enter entry equal
error essay event exact exist extra fable faint fairy faith false fancy favor feast fence ferry
fetch fever fiber field fifth fight final first flame flash fleet float flock flood floor flour
fluid flute focus force forge forth forum found frame fresh front frost fruit gauge ghost giant
given glass globe glory glove grace grade grain grand grant grape graph grasp grass great green
greet grief grill grind group grove guard guess guest guide habit happy harsh hazel heart heavy
hedge hello hinge hobby honey honor horse hotel house human humor ideal image index inner input
ivory jelly jewel joint jolly judge juice kayak knife knock label labor lance large laser later
laugh layer learn lemon level lever light lilac limit linen liver local lodge logic loose lower
loyal lucky lunar lunch magic major maple march marsh match mayor medal melon mercy merit metal
might minor mixed model money month moral motor mount mouse mouth movie music nerve never night
noble noise north novel nurse oasis ocean offer olive onion opera orbit order organ other outer
owner oxide paint panel paper party pasta patch pause peace peach pearl pedal phase phone photo
piano piece pilot pitch place plain plane plant plate plaza pound power press price pride prime
print prize proof proud pulse pupil queen quest quick quiet quilt quote radar radio raise ranch
range rapid ratio reach ready realm rebel refer reign relax reply rhyme ridge right rival river
roast robin rough round route royal ruler rural salad sauce scale scarf scene scent scope score
scout serve seven shade shake shape share sharp sheep shelf shell shift shine shirt shock shore
short shout sight silky skate skill slate sleep slice slide slope small smart smile smoke snack
snake solar solid solve sound south space spare spark speak spear speed spell spend spice spine
spoon sport spray squad stack staff stage stair stake stamp stand stare start state steam steel
steep stern stick still stone store storm story stove straw stump style sugar sunny swamp swear
sweep sweet swift swing sword table taste teach thank theme thick thing think third thorn those
three throw thumb tiger tight timer title toast today topic torch total touch tough tower trace
track trade trail train treat trend trial tribe trick truck truly trunk trust truth tulip twice
twist uncle under union unity upper urban usual valid value valve vapor vault verse video visit
vital vivid voice wagon waist waste watch water weave wedge whale wheat wheel where while white
whole width witch woman world worry worth wound wrist write yacht yield young youth zebra
"""

WORDS: tuple[str, ...] = tuple(_TEXT.split())
